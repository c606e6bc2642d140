"""Any invalid config.json or signed checkpoint gives a one-line error, and nothing is written."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_run import Stop, make_dataset, stop, use_tiny
from trained_run import invoke

from resnet_fast.cli.export import real_images
from resnet_fast.cli.run import _what_is_kept
from resnet_fast.data.load import load_dataset
from resnet_fast.inference import load_trained, trained
from resnet_fast.training import ResumeError, network, prepare, resume
from resnet_fast.training.checkpoint import write_checkpoint

NOBODYS, LONG = "~nobody-of-that-name/x", "a" * 5000


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny(monkeypatch.setattr)
    monkeypatch.setattr(trained, "MODELS", network.MODELS)
    monkeypatch.setattr("resnet_fast.data.load_dataset", lambda *args, **kwargs: make_dataset())
    monkeypatch.setattr("resnet_fast.evaluation.write_pictures", lambda *args: [])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny(monkeypatch.setattr)
        return stop(tmp_path_factory.mktemp("runs") / "run", 3, ema=0.5)


@pytest.fixture
def broken(run: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be broken."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def write_config(folder: Path, content: dict) -> None:
    (folder / "config.json").write_text(json.dumps(content))


def write_signed(folder: Path, content: dict) -> None:
    write_checkpoint(folder / "checkpoint.pt", content, None)


def changed(content: Any, path: str, change: Callable[[Any], Any]) -> None:
    *way, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    for key in way:
        content = content[key]
    content[last] = change(content[last])


UNFIT = {
    "weights of another shape": ("model/fc.weight", lambda w: w[:2], "checkpoint.model.fc.weight must be float32"),
    "weights of another type": ("trained_model/fc.bias", lambda w: w.double(), "got float64 [3]"),
    "an average that is none": ("trained_model", lambda w: None, "checkpoint.trained_model must be a dict, got None"),
    "momentum of another shape": (
        "step/optimizer/state",
        lambda state: {**state, 0: {"momentum_buffer": torch.zeros(1)}},
        "step.optimizer.state.0.momentum_buffer must be float32",
    ),
    "momentum that is missing": (
        "step/optimizer/state",
        lambda state: {key: state[key] for key in list(state)[1:]},
        "step.optimizer.state holds no 0",
    ),
    "a number too many in numpy's state": (
        "random/0/numpy",
        lambda state: (*state[:2], 10**6, *state[3:]),
        "random must be a list of random states",
    ),
    "python's state cut": ("random/0/python", lambda state: (3, state[1][:9], None), "does not fit its settings"),
    "torch's state cut": ("random/0/torch", lambda state: state[:9], "does not fit its settings"),
    "an epoch too many": ("epoch", lambda epoch: epoch + 1, "is of epoch 3 but holds the metrics of 2 epochs"),
    "metrics without one": (
        "history/0",
        lambda row: {"epoch": 1},
        "history must be a list with a dict of numbers for each epoch",
    ),
    "two means": ("mean", lambda mean: mean[:2], "mean must be 3 numbers in 0 … 1, got [0.5, 0.5]"),
    "a huge image": ("image_size", lambda size: 10**9, "image_size must be an integer in 8 … 1024, got 1000000000"),
    "a class twice": (
        "classes",
        lambda names: ["a", "a", "b"],
        "classes must be a list of different names, got ['a', 'a'",
    ),
    "another class": (
        "classes",
        lambda names: ["a", "b", "d"],
        "only the checkpoint has 'd'; only config.json has 'c'",
    ),
    "400 digits": (
        "config/epochs",
        lambda n: 10**400,
        "epochs must be a number, text, True or False, got an integer of",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_checkpoint_that_does_not_fit_is_named(case: str, broken: Path):
    path, change, reason = UNFIT[case]
    content = torch.load(broken / "checkpoint.pt", weights_only=True)
    del content["format"]
    changed(content, path, change)
    write_signed(broken, content)
    before = {file.name: file.read_bytes() for file in broken.iterdir()}
    with pytest.raises(ResumeError) as caught:
        resume(broken, Stop(3))
    assert reason in str(caught.value), str(caught.value)
    assert {file.name: file.read_bytes() for file in broken.iterdir()} == before


def test_the_settings_of_the_optimizer_are_those_of_config(broken: Path):
    """A file cannot change what a run computes: its groups are not read."""
    content = torch.load(broken / "checkpoint.pt", weights_only=True)
    del content["format"]
    expected = resume(Path(shutil.copytree(broken, broken.with_name("as it was"))))
    content["step"]["optimizer"]["param_groups"][0].update(momentum=0.0, weight_decay=1e3, maximize=True)
    write_signed(broken, content)
    found = resume(broken)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name


CONFIGS = {
    "nested": ("[" * 100_000, "is not JSON"),
    "a list": ("[]", r"it must hold a dict, got \[\]"),
    "too large": ('{"x": "' + "x" * 2**24 + '"}', "must have at most 16,777,216 bytes, got "),
    "not UTF-8": (b"\xff\xfe\xfd", "is not JSON"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_none(case: str, broken: Path):
    text, reason = CONFIGS[case]
    (broken / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ResumeError, match=f"config.json .*{reason}"):
        resume(broken)


def test_a_fifo_in_place_of_config_is_named(broken: Path):
    (broken / "config.json").unlink()
    os.mkfifo(broken / "config.json")
    with pytest.raises(ResumeError, match=r"config\.json is not a regular file"):
        resume(broken)


def test_what_is_kept_of_a_run_does_not_wait_for_a_fifo(tmp_path: Path):
    os.mkfifo(tmp_path / "config.json")
    assert _what_is_kept(tmp_path) == "nothing was written"
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").touch()
    os.mkfifo(tmp_path / "metrics.csv")
    assert _what_is_kept(tmp_path).startswith("no epoch was finished")
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").write_bytes(b"epoch\n\xff\n")  # no text
    assert _what_is_kept(tmp_path).endswith("up to epoch 1")


@pytest.mark.parametrize(
    "command", [("eval", NOBODYS), ("predict", NOBODYS, "x.png"), ("export", NOBODYS), ("train", "--resume", NOBODYS)]
)
def test_the_home_of_nobody_is_no_run(command: tuple[str, ...]):
    result = invoke(*command)
    assert result.exit_code == 2 and result.stderr.startswith("resnet-fast: error: ") and NOBODYS in result.stderr


@pytest.mark.parametrize("command", ["eval"])
@pytest.mark.parametrize(
    ("data_dir", "rule"),
    [
        (NOBODYS, f"name an existing user after ~, got '{NOBODYS}'"),
        ("caf\udce9", "be a path in UTF-8, got 'caf\\udce9'"),
    ],
    ids=["home of nobody", "not UTF-8"],
)
def test_a_data_dir_that_is_no_path_is_named(command: str, data_dir: str, rule: str, broken: Path):
    result = invoke(command, broken, "--data-dir", data_dir)
    assert result.exit_code == 2 and result.stderr == f"resnet-fast: error: data_dir must {rule}\n"


@pytest.mark.parametrize("dataset", ["cifar10", "folder"])
def test_a_data_dir_of_any_length_has_no_images_to_export(dataset: str, broken: Path, monkeypatch):
    monkeypatch.setattr("resnet_fast.data.load_dataset", load_dataset)
    whole = load_trained(broken)
    assert real_images(replace(whole, config={**whole.config, "dataset": dataset, "data_dir": LONG}), None) is None


@pytest.mark.parametrize("command", [("train", "--dataset", "digits"), ("study", "skip")])
def test_an_out_of_any_length_is_told(command: tuple[str, ...]):
    result = invoke(*command, "--device", "cpu", "--out", LONG)
    assert result.exit_code == 1 and "File name too long" in result.stderr


def test_classes_that_differ_late_are_named(broken: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare, "load_dataset", lambda *a, **k: replace(make_dataset(), classes=("a", "c", "b")))
    with pytest.raises(ResumeError, match="in the classes, the order differs from number 2 on: the data set has 'c'"):
        resume(broken)


def test_a_network_whose_output_is_not_finite_is_not_drawn(broken: Path, image: Path):
    content = torch.load(broken / "checkpoint.pt", weights_only=True)
    content["model"]["fc.bias"] *= float("nan")
    del content["format"]
    write_signed(broken, content)
    result = invoke("predict", broken, image)
    assert result.exit_code == 1 and "image.png is not finite" in result.stderr


def test_a_run_of_an_earlier_version_goes_on(broken: Path):
    """What there was no setting for then is off."""
    content = json.loads((broken / "config.json").read_text())
    checkpoint = torch.load(broken / "checkpoint.pt", weights_only=True)
    del checkpoint["format"]
    mixing = ("trivial_augment", "random_erasing", "mixup", "cutmix")
    added = "muon_lr", "muon_momentum", "rescale_filters", "lookahead", "bn_momentum", "sizes"
    for name in ("weights", "skip_unreadable", *mixing, *added):
        del content[name], checkpoint["config"][name]
    write_config(broken, content)
    write_signed(broken, checkpoint)
    config = resume(broken).config
    assert config.weights is None and config.skip_unreadable is False
    assert (config.trivial_augment, config.random_erasing, config.mixup, config.cutmix) == (False, 0, 0, 0)
    assert [getattr(config, name) for name in added] == [0.12, 0.6, False, False, 0.1, ""]
    assert load_trained(broken).epoch == 3
