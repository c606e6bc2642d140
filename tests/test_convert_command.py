"""`resnet-fast convert` shows how a model changes and that its results stay the same, or a one-line error."""

import sys

import pytest
from typer.testing import CliRunner

from resnet_fast.cli import app

pytestmark = pytest.mark.usefixtures("on_aten")

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


def leaves():
    raise SystemExit("enough")


class Outputs(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, x):
        return self.of(x)


def of_no_parameters():
    return nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.ReLU())


def frozen():
    return thin().requires_grad_(False)


def asserts():
    def square(x):
        assert x.shape[2] == 7, "images of 7 pixels"
        return x

    return thin(head=(Outputs(square),))


def asserts_without_a_word():
    def refuse(x):
        assert False

    return thin(head=(Outputs(refuse),))


def exits():
    return thin(head=(Outputs(exit),))


def gives_an_object():
    return thin(head=(Outputs(lambda x: object()),))


def gives_lists_in_a_dict():
    return thin(head=(Outputs(lambda x: {"y": x, "all": [x]}),))


def gives_nothing():
    return thin(head=(Outputs(lambda x: ()),))


def gives_one_of_two():
    return thin(head=(Outputs(lambda x: (x, None)),))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)

    def run(*arguments: str):
        before = list(sys.path)
        result = CliRunner().invoke(app, ["convert", *arguments])
        assert sys.path == before
        return result

    return run


def test_a_model_of_a_file(run):
    result = run("mine.py:thin", "--arg", "6", "--image-size", "5")
    assert result.exit_code == 0
    assert result.stdout == (
        "1  BN+ReLU\n"
        "converted 1 (1 BN+ReLU), left 0\n"
        "training: outputs, gradients, statistics differ by 0.0e+00 of their size, fp64\n"
        "evaluation: outputs, gradients, statistics differ by 0.0e+00 of their size, fp64\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", (("torchvision.models:resnet18",), ("timm:create_model", "--arg", "resnet18")))
def test_models_of_libraries(target, run):
    result = run(*target, "--arg", "num_classes=3")
    assert result.exit_code == 0
    assert "converted 20 (9 BN+ReLU, 5 BN+add+ReLU, 6 BN+BN+add+ReLU), left 0\n" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_a_difference_is_an_error(run, monkeypatch):
    monkeypatch.setattr("resnet_fast.conversion.check.difference", lambda *_: float("nan"))
    result = run("mine.py:thin")
    assert result.exit_code == 1 and "they must differ by at most 1e-06" in result.stderr


WRONG = {
    "no function": (
        ("mine.py",),
        2,
        "the model must be MODULE:FUNCTION, such as torchvision.models:resnet50, got 'mine.py'",
    ),
    "misspelt": (("mine.py:thim",), 2, "mine.py has no 'thim'; did you mean thin?"),
    "no file": (("yours.py:thin",), 2, "yours.py is not a file"),
    "home of nobody": (("~nobody-of-that-name/yours.py:thin",), 2, "yours.py is not a file"),
    "a long name": ((f"{'a' * 5000}.py:thin",), 2, "a.py is not a file"),
    "no module": (("nothing.here:thin",), 2, "nothing.here cannot be imported: ModuleNotFoundError"),
    "fails": (("mine.py:fails",), 2, "mine.py:fails fails: KeyError: 'no\\nsuch thing'"),
    "no model": (("mine.py:makes_a_number",), 2, "mine.py:makes_a_number must return an nn.Module, got int"),
    "unknown argument": (("mine.py:thin", "--arg", "depth=3"), 2, "mine.py:thin fails: TypeError"),
    "leaves": (("mine.py:leaves",), 2, "mine.py:leaves fails: SystemExit: enough"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_a_line(name, run):
    arguments, code, message = WRONG[name]
    result = run(*arguments)
    assert result.exit_code == code and not result.stdout
    assert message in result.stderr


@pytest.mark.parametrize("name", ("of_no_parameters", "frozen", "gives_one_of_two"))
def test_models_of_any_kind(name, run):
    result = run(f"mine.py:{name}", "--image-size", "5")
    assert result.exit_code == 0 and not result.stderr


OUTPUTS = "ValueError: outputs must be tensors, or a tuple, list or dict of them, got"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("asserts", "AssertionError: images of 7 pixels"),
        ("asserts_without_a_word", "AssertionError"),
        ("exits", "SystemExit: "),
        ("gives_an_object", f"{OUTPUTS} object"),
        ("gives_lists_in_a_dict", f"{OUTPUTS} dict of list"),
        ("gives_nothing", f"{OUTPUTS} tuple of none"),
    ],
)
def test_models_that_cannot_be_tried_say_why_in_a_line(name, reason, run):
    result = run(f"mine.py:{name}")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        f"resnet-fast: error: mine.py:{name} cannot be tried on images of [4, 3, 32, 32] (--image-size): {reason}"
    )


@pytest.mark.parametrize("line", ("raise ValueError('no')", "raise SystemExit(0)", "exit(3)"))
def test_a_file_that_cannot_be_imported_is_named_and_leaves_no_module(line, run, tmp_path):
    for name in ("another.py", "broken.py"):
        (tmp_path / name).write_text(line)
    run("another.py:thin")  # whatever the command imports when it runs for the first time
    before = set(sys.modules)
    result = run("broken.py:thin")
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.startswith("resnet-fast: error: broken.py cannot be imported: ")
    assert set(sys.modules) == before


def test_a_file_takes_the_name_of_no_module(run, tmp_path):
    (tmp_path / "mine.py").rename(tmp_path / "json.py")
    before = sys.modules["json"]
    assert run("json.py:thin").exit_code == 0 and sys.modules["json"] is before


def test_images_that_do_not_fit_name_the_option(run):
    result = run("mine.py:flat")
    assert result.exit_code == 1 and "cannot be tried on images of [4, 3, 32, 32] (--image-size): " in result.stderr
    assert run("mine.py:flat", "--image-size", "2").exit_code == 0
