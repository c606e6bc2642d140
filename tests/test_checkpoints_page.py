"""docs/checkpoints.md: its example prints the text below it, and its error is the one that is raised."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from pages import DOCS, run_example

from resnet_fast import CheckpointMismatch, load_checkpoint, resnet18

PAGE = (DOCS / "checkpoints.md").read_text(encoding="utf-8")


def indented(after: str) -> str:
    """The first indented text after a word of the page."""
    found = re.search(r"\n\n((?: {4}.*\n)+)", PAGE[PAGE.index(after) :])
    assert found
    return textwrap.dedent(found[1])


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    names = run_example(DOCS / "checkpoints.md")
    assert capsys.readouterr().out == indented("print(load_checkpoint")
    for name, value in names["theirs"].module.state_dict().items():
        assert torch.equal(names["model"].state_dict()[name], value), name

    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(resnet18(), "theirs.pth")
    assert str(caught.value) + "\n" == indented("## If a file does not fit")
