"""docs/convert.md: its example runs and prints the text below it."""

import pytest
import torchvision
from pages import DOCS, run_example


@pytest.mark.slow
def test_the_page(capsys, on_aten):
    names = run_example(DOCS / "convert.md")
    printed = capsys.readouterr().out
    assert f"\n\n    {printed}\n" in (DOCS / "convert.md").read_text(encoding="utf-8")
    assert type(names["model"]) is torchvision.models.ResNet and names["serving"] is not names["model"]
