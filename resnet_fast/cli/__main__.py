"""`python -m resnet_fast.cli`."""

from resnet_fast.cli import app

app(prog_name="resnet-fast")
