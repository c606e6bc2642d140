"""`resnet-fast convert` shows what becomes of a model, and that its results stay; or says what is wrong, in a line."""

import pytest
from typer.testing import CliRunner

from resnet_fast import functional
from resnet_fast.cli import app, convert

FILE = """
from torch import nn


def thin(width=4, head=()):
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.ReLU(), *head)


def flat():
    return thin(head=(nn.Flatten(), nn.Linear(16, 2)))


def fails():
    raise KeyError("no\\nsuch thing")


def makes_a_number():
    return 3
"""


@pytest.fixture(autouse=True)
def on_aten(monkeypatch):
    monkeypatch.setattr(functional, "choose_backend", lambda x, requested=None: "aten")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)

    def run(*arguments: str):
        return CliRunner().invoke(app, ["convert", *arguments])

    return run


def test_a_model_of_a_file(run):
    result = run("mine.py:thin", "--arg", "6", "--image-size", "5")
    assert result.exit_code == 0
    assert result.stdout == (
        "1  BN+ReLU\n"
        "converted 1 (1 BN+ReLU), left 0\n"
        "training: outputs, gradients and statistics differ by 0.0e+00 of their size (fp64)\n"
        "evaluation: outputs, gradients and statistics differ by 0.0e+00 of their size (fp64)\n"
    )


@pytest.mark.parametrize("target", (("torchvision.models:resnet18",), ("timm:create_model", "--arg", "resnet18")))
def test_models_of_libraries(target, run):
    result = run(*target, "--arg", "num_classes=3")
    assert result.exit_code == 0
    assert "converted 20 (9 BN+ReLU, 5 BN+add+ReLU, 6 BN+BN+add+ReLU), left 0\n" in result.stdout
    assert all(len(line) <= 88 for line in result.stdout.splitlines())


def test_a_difference_is_an_error(run, monkeypatch):
    monkeypatch.setattr(convert, "difference", lambda *_: float("nan"))
    result = run("mine.py:thin")
    assert result.exit_code == 1 and "they must differ by at most 1e-06" in result.stderr


WRONG = {
    "no function": (
        ("mine.py",),
        2,
        "the model must be MODULE:FUNCTION, such as torchvision.models:resnet50, got 'mine.py'",
    ),
    "misspelt": (("mine.py:thim",), 2, "mine.py has no 'thim'; near: thin"),
    "no file": (("yours.py:thin",), 2, "yours.py is no file"),
    "no module": (("nothing.here:thin",), 2, "nothing.here cannot be imported: ModuleNotFoundError"),
    "fails": (("mine.py:fails",), 2, "mine.py:fails fails: KeyError: 'no\\nsuch thing'"),
    "no model": (("mine.py:makes_a_number",), 2, "mine.py:makes_a_number must make an nn.Module, got int"),
    "unknown argument": (("mine.py:thin", "--arg", "depth=3"), 2, "mine.py:thin fails: TypeError"),
    "other images": (("torchvision.models:resnet18", "--image-size", "1", "--batch-size", "1"), 2, "batch-size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_a_line(name, run):
    arguments, code, message = WRONG[name]
    result = run(*arguments)
    assert result.exit_code == code and not result.stdout
    assert message in result.stderr


def test_images_that_do_not_fit_name_the_option(run):
    result = run("mine.py:flat")
    assert result.exit_code == 1 and "mine.py:flat fails on images of [4, 3, 32, 32]" in result.stderr
    assert run("mine.py:flat", "--image-size", "2").exit_code == 0
