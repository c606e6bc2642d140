"""No escape code in a name, path or file reaches the terminal, from any command."""

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from stand_in import stand_in
from trained_run import Tiny, invoke, make_image_folder
from typer.testing import Result as CliResult

from resnet_fast.cli.text import can_show
from resnet_fast.common.terminal import CleanStream, clean, clean_output, unfiltered
from resnet_fast.ops import augment
from resnet_fast.training import MODELS, console, run_folder
from resnet_fast.training.console import LiveReporter

# Clears the screen, rings, begins a sequence as one character, turns the direction, deletes; and forges a line.
CODES = "\x1b[2J\x07\x9b31m\u202e\x7f"
FORGED = "\nresnet-fast: all is well"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="names of files hold no such characters there")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "resnet18", stand_in(lambda *, num_classes, stem: Tiny(num_classes)))
    monkeypatch.setattr(augment, "choose_backend", lambda x: "aten")  # as in test_cli_train.py
    # Pictures, which take longer than all else, show nothing on a terminal.
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args: None)
    for module in ("training.run_folder", "evaluation"):
        monkeypatch.setattr(f"resnet_fast.{module}.write_pictures", lambda *args: ["confusion.png"])


def assert_is_clean(result: CliResult) -> None:
    said = result.stdout + result.stderr
    assert set(said) & set(CODES) - set("2J31m[") == set(), said
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert not any(line.startswith("resnet-fast: all is well") for line in result.stderr.splitlines())


def test_a_run_of_hostile_names_and_what_is_done_with_it(tmp_path: Path):
    data = make_image_folder(tmp_path / f"data{CODES}", classes=(f"a{CODES}", f"b{CODES}"), n_train=2)
    (data / "train" / f"a{CODES}" / f"left out{FORGED}.txt").touch()
    out = tmp_path / f"run{CODES}"
    options = ("--device", "cpu", "--data-dir", data)
    trained = invoke("train", "--dataset", "folder", *options, "--out", out, "--epochs", 1, "--batch-size", 2)
    image = shutil.copy(next(data.rglob("*.png")), tmp_path / f"{CODES}{FORGED}.png")
    broken = tmp_path / f"{CODES}{FORGED}"
    broken.write_bytes(b"no image")
    for code, result in (
        (0, trained),
        (2, invoke("train", "--dataset", "folder", *options, "--out", out)),  # it is there
        (1, invoke("train", "--dataset", "folder", "--data-dir", out, "--out", tmp_path / "other")),
        (0, invoke("train", "--resume", out)),
        (0, tested := invoke("eval", out)),
        (1, invoke("eval", out, "--data-dir", tmp_path / f"gone{CODES}")),
        (1, invoke("predict", out, image, broken)),
        (2, invoke("export", out, "--format", CODES)),
        (2, invoke("profile", "--out", out)),
        (2, invoke("study", "skip", "--device", "cpu", "--out", out)),
    ):
        assert result.exit_code == code, result.output
        assert_is_clean(result)
    assert f"b{clean(CODES)}" in tested.stdout  # shown all the same


def test_a_checkpoint_of_hostile_strings(tmp_path: Path):
    path = tmp_path / f"checkpoint{CODES}.pt"
    torch.save({"state_dict": {f"layer{CODES}.weight": torch.zeros(2), **Tiny(10).state_dict()}}, path)
    options = ("--dataset", "digits", "--device", "cpu", "--out", tmp_path / "run")
    result = invoke("train", *options, "--weights", path)
    assert result.exit_code == 1 and f"    layer{repr(CODES)[1:-1]}.weight" in result.stderr.splitlines()
    assert_is_clean(result)
    path.write_bytes(f"{CODES}{FORGED}".encode())
    for command in ("eval", "predict", "export"):
        result = invoke(command, path, *(["x.png"] if command == "predict" else []))
        assert result.exit_code == 1
        assert_is_clean(result)


def test_arguments_are_told_without_their_codes():
    for args in (
        [CODES],
        ["train", f"--{CODES}"],
        ["train", "--epochs", CODES],
        ["train", "--resume", CODES + FORGED],
        ["summary", CODES],
        ["convert", f"{CODES}{FORGED}:make"],
        ["tune", "--device", CODES],
    ):
        result = invoke(*args)
        assert result.exit_code == 2
        assert_is_clean(result)


def test_warnings_and_what_others_print_is_clean_too(capsys: pytest.CaptureFixture):
    with clean_output():
        print(f"two\nlines\t{CODES}")
        print("\rdownload: 50 %", end="")
        print(f"UserWarning: {CODES}", file=sys.stderr)
    said = capsys.readouterr()
    assert said.out == f"two\nlines\t{clean(CODES)}\n\rdownload: 50 %"
    assert said.err == f"UserWarning: {clean(CODES)}\n"


def test_output_is_as_before_after_the_command(capsys: pytest.CaptureFixture):
    before = sys.stdout, sys.stderr
    invoke("doctor", "--device", "none")
    assert (sys.stdout, sys.stderr) == before


def test_output_may_be_closed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)  # by `>&-`
    assert not can_show("x")
    with clean_output():
        print("x", flush=True)
        assert not sys.stdout.isatty()
    assert sys.stdout is None


def test_there_is_no_way_around_in_an_ascii_locale():
    """Where typer finds a binary stream beneath one of ASCII, it writes there."""
    beneath = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert not hasattr(CleanStream(beneath), "buffer") and unfiltered(CleanStream(beneath)) is beneath


def test_a_live_display_cleans_its_lines_and_what_others_print(monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    monkeypatch.setattr(
        console, "Console", lambda **settings: Console(**{**settings, "file": terminal, "force_terminal": True})
    )
    monkeypatch.setattr(console, "format_start", lambda *args: [CODES])
    monkeypatch.setattr(console, "format_header", lambda *args: "header")
    reporter = LiveReporter()
    reporter.note(f"weights of {CODES}")
    reporter.start(object(), object())  # type: ignore[arg-type]
    print(f"of others: {CODES}")
    reporter.close()
    shown = terminal.getvalue()
    assert "\x1b[" in shown and not set(shown) & set("\x07\x9b\u202e\x7f") and "\x1b[2J" not in shown
    assert f"weights of {clean(CODES)}" in shown and f"of others: {clean(CODES)}" in shown
