"""docs/images.md: its example prints the text below it, and its commands run on the folder that it makes."""

import re
import shlex
from pathlib import Path

import pytest
from pages import DOCS, run_example
from trained_run import invoke, use_tiny

from resnet_fast.ops import augment

PAGE = (DOCS / "images.md").read_text(encoding="utf-8")


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    use_tiny(monkeypatch)
    monkeypatch.setattr(augment, "choose_backend", lambda x: "aten")  # an interpreted kernel takes longer
    run_example(DOCS / "images.md")
    printed = "".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines())
    assert f"```\n\n{printed}\n" in PAGE

    Path("images/test/dog/broken.jpg").unlink()  # without --skip-unreadable it would end the commands
    commands = re.findall(r"^    resnet-fast (.*)$", PAGE, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["train", "eval", "predict"]
    for command in commands:
        options = ["--epochs", "1", "--batch-size", "4", "--workers", "0"] if command.startswith("train") else []
        result = invoke(*shlex.split(command), *options)
        assert result.exit_code == 0, result.output
