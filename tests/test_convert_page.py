"""docs/convert.md: its example runs and prints what stands below it."""

import re
from pathlib import Path

import torchvision

from resnet_fast import functional

PAGE = (Path(__file__).parents[1] / "docs/convert.md").read_text(encoding="utf-8")


def test_the_page(capsys, monkeypatch):
    monkeypatch.setattr(functional, "choose_backend", lambda x, requested=None: "aten")
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(example, names)
    printed = capsys.readouterr().out
    assert f"\n\n    {printed}\n" in PAGE
    assert type(names["model"]) is torchvision.models.ResNet and names["serving"] is not names["model"]
