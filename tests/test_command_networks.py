"""The commands accept a network of every family: it trains, is loaded again, tested, exported and profiled.

Those of torchvision's family have tests of their own, command by command.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from trained_run import invoke, make_image_folder

from resnet_fast.inference import load_trained
from resnet_fast.models import ResidualBlock, ResNetModel
from resnet_fast.models.registry import MODELS, Model
from resnet_fast.ops import augment
from resnet_fast.profiling import profile_config
from resnet_fast.profiling.providers import checked_steps
from resnet_fast.training import prepare, run_folder

ONE_OF_EACH = list({m.family: name for name, m in reversed(MODELS.items()) if m.family != "torchvision"}.values())


def thin(name: str) -> Model:
    """The network with few channels."""
    model = MODELS[name]
    if name != "article":
        return replace(model, build=partial(model.build, width=4))

    def build(num_classes: int, norm_layer=None) -> ResNetModel:
        blocks = [(64, 8, True, 2), (8, 8, False, 2)]
        return ResNetModel(
            [ResidualBlock(*block, norm_layer=norm_layer) for block in blocks], num_classes, norm_layer=norm_layer
        )

    return replace(model, build=build)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, on_aten: None) -> None:
    """Thin networks, no interpreted kernels, and no pictures."""
    for name in ONE_OF_EACH:
        monkeypatch.setitem(MODELS, name, thin(name))
    monkeypatch.setattr("resnet_fast.evaluation.write_pictures", lambda *args: [])
    monkeypatch.setattr(augment, "choose_backend", lambda x: "aten")
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args: None)
    monkeypatch.setattr(run_folder, "write_pictures", lambda *args: None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "images", n_train=2)


def train(images: Path, out: Path, *args: object):
    settings = {"dataset": "folder", "data-dir": images, "image-size": 16, "batch-size": 3, "epochs": 1}
    settings |= {"device": "cpu", "precision": "fp32", "workers": 0, "out": out, "recipe": "article"}
    return invoke("train", *(part for name, value in settings.items() for part in (f"--{name}", value)), *args)


@pytest.mark.parametrize("name", [ONE_OF_EACH[0], *(pytest.param(n, marks=pytest.mark.slow) for n in ONE_OF_EACH[1:])])
def test_it_is_trained_on_ghost_batches_averaged_tested_and_exported(name: str, images: Path, tmp_path: Path):
    out = tmp_path / "run"
    result = train(images, out, "--model", name, "--batch-size", 4, "--ghost-batch-size", 2, "--ema", 0.5)
    assert result.exit_code == 0, result.output
    stem = MODELS[name].stems[0]
    assert result.stdout.startswith(f"{name} ({stem} stem) on folder: 6 + 9 images")
    assert json.loads((out / "config.json").read_text())["stem"] == stem
    loaded = load_trained(out)
    assert type(loaded.model) is type(MODELS[name].make(3, stem))
    assert loaded.description == f"{name} ({stem} stem) on folder, epoch 1"
    tested = invoke("eval", out, "--device", "cpu")
    assert tested.exit_code == 0, tested.output
    exported = invoke("export", out, "--format", "torch")
    assert exported.exit_code == 0, exported.output
    state = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    counts = {int(value) for key, value in state.items() if key.endswith("num_batches_tracked")}
    # Six images are three groups; the article's blocks have one norm for two places.
    assert counts == ({3, 6} if name == "article" else {3})


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_eager_trains_the_numbers_of_fused(name: str, images: Path, tmp_path: Path):
    states = []
    for backend in ("fused", "eager"):
        result = train(images, tmp_path / backend, "--model", name, "--backend", backend, "--dirac")
        assert result.exit_code == 0, result.output
        states.append(torch.load(tmp_path / backend / "checkpoint.pt", weights_only=True)["model"])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_profile_checks_it_against_the_plain_network(name: str):
    config = profile_config(model=name, batch_size=4, precision="fp32", device="cpu", image_size=16)
    assert config.stem == MODELS[name].stems[0]
    steps = checked_steps(config)
    assert type(steps["fused"].model) is type(MODELS[name].make(3, config.stem))
    loss, logits = steps["fused"]()
    assert loss.isfinite() and logits.shape == (4, 10)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "resnt18"], "got 'resnt18'; did you mean resnet18"),
        (["--model", "article", "--stem", "cifar"], "stem must be imagenet for article"),
        (["--model", "article", "--zero-gamma"], "zero_gamma must be False for article, got True: a block's one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_means_nothing_is_refused_before_data_are_loaded(args: list, message: str, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(prepare, "load_dataset", lambda *args, **kwargs: pytest.fail("data were loaded"))
    result = train(tmp_path / "absent", tmp_path / "run", *args)
    assert result.exit_code == 2 and message in result.stderr and not (tmp_path / "run").exists()


def test_profile_takes_the_same_names():
    result = invoke("profile", "--model", "artcle", "--device", "cpu")
    assert result.exit_code == 2 and "did you mean article?" in result.stderr
