"""The examples run as they stand, on few digits and a thin network: they learn, fused, and the loops agree, recorded
(by the stand-in of recorded_graph.py) and not.
"""

import importlib.util
import re
import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import pytest
import torch
from recorded_graph import RecordedGraph
from thin_resnet import thin_resnet
from torch import nn

import resnet_fast
from resnet_fast import data, training
from resnet_fast.models import resnet
from resnet_fast.ops import backend

ROOT = Path(__file__).parents[1]
EXAMPLES = {"ten_lines": None, "plain_pytorch": None, "with_lightning": "lightning", "with_accelerate": "accelerate"}
OWN_LOOPS = ("plain_pytorch", "with_lightning", "with_accelerate")
N_IMAGES, BATCH, EPOCHS = 200, 16, 6  # the last batch of an epoch is a smaller one
N_STEPS = 78


class Run(NamedTuple):
    losses: list[float]
    accuracy: float
    fused: list[bool]


def tiny_digits() -> data.ImageDataset:
    """Some of the digits, of 16x16 pixels; tested are images that it is trained on."""
    digits = data.load_digits()
    images, labels = digits.train.images[:N_IMAGES, :, ::2, ::2], digits.train.labels[:N_IMAGES]  # type: ignore[attr-defined]
    return replace(digits, train=data.TensorSplit(images, labels), test=data.TensorSplit(images, labels))


@pytest.fixture(autouse=True)
def fast(monkeypatch, one_thread):
    """No interpreted kernels."""
    monkeypatch.setattr(backend, "_INTERPRETED", False)


@pytest.fixture(scope="module")
def done() -> dict[str, Run]:
    """The runs that tests share."""
    return {}


@pytest.fixture
def run(done, monkeypatch, capsys):
    def run(name: str) -> Run:
        needed = EXAMPLES[name]
        if needed is not None and importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
        if name not in done:
            done[name] = run_example(name, monkeypatch, capsys)
        return done[name]

    return run


def watch_fusion(monkeypatch) -> list[bool]:
    """Whether the network was fused, as a whole, in each forward of training from now on."""
    fused, blocks_to_fuse = [], resnet.ResNet._blocks_to_fuse

    def watched(self, x):
        blocks = blocks_to_fuse(self, x)
        if self.training:
            fused.append(bool(blocks))
        return blocks

    monkeypatch.setattr(resnet.ResNet, "_blocks_to_fuse", watched)
    return fused


def thin(*, num_classes: int, stem: str) -> nn.Module:
    model = thin_resnet(resnet)
    model.fc = nn.Linear(16, num_classes)
    return model


def run_example(name: str, monkeypatch, capsys) -> Run:
    digits, recipe = tiny_digits(), replace(training.RECIPES["digits"], epochs=EPOCHS, batch_size=BATCH, lr=0.05)
    monkeypatch.setattr(data, "load_dataset", lambda name: digits)
    monkeypatch.setitem(training.RECIPES, "digits", recipe)
    fused = watch_fusion(monkeypatch)
    monkeypatch.setattr(resnet_fast, "resnet18", thin)
    runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^epoch \d+: loss of the last batch ([\d.]+)$", printed, re.M)]
    (accuracy,) = re.findall(r"^test accuracy ([\d.]+)%$", printed, re.M)
    return Run(losses, float(accuracy), fused)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "with_lightning" else n for n in EXAMPLES]
)
def test_an_example_learns_and_is_fused(name, run):
    result = run(name)
    assert len(result.losses) == EPOCHS and result.losses[-1] < result.losses[0]
    assert result.accuracy > 50  # by chance: 10
    assert all(result.fused)
    # A recorded step is replayed.
    assert len(result.fused) == N_STEPS or (torch.cuda.is_available() and result.fused)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU some of the kernels of cuDNN are not deterministic")
@pytest.mark.parametrize("name", OWN_LOOPS[1:])
def test_a_framework_computes_what_the_plain_loop_does(name, run):
    """All batches of all epochs, in the same order, at the same learning rates."""
    assert run(name) == run(OWN_LOOPS[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in records what runs on a CPU")
@pytest.mark.parametrize("name", OWN_LOOPS)
def test_a_recorded_loop_computes_the_same(name, run, monkeypatch, capsys):
    expected = run(name)
    step = partial(resnet_fast.graphed, make_graph=RecordedGraph, fallback=False)
    monkeypatch.setattr(resnet_fast, "graphed", step)
    recorded = run_example(name, monkeypatch, capsys)
    assert (recorded.losses, recorded.accuracy) == (expected.losses, expected.accuracy)
    assert all(recorded.fused) and len(recorded.fused) == 10  # two sizes: once as they are, four times to record them


def test_accelerate_in_bf16_leaves_the_network_fused(monkeypatch):
    """It puts a forward of its own on the network."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    fused = watch_fusion(monkeypatch)
    model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(thin(num_classes=3, stem="cifar"))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert isinstance(model.__dict__["forward"], MethodType)
    model(torch.rand(2, 3, 8, 8))
    assert fused == [True]


def test_the_page_shows_the_ten_lines():
    source = (ROOT / "examples/ten_lines.py").read_text(encoding="utf-8")
    shown = source.split('"""\n\n', 1)[1].replace("  # type: ignore[call-overload]", "")
    assert f"```python\n{shown}```" in (ROOT / "docs/own-loop.md").read_text(encoding="utf-8")


def test_examples_are_short_and_named_in_the_page():
    for name in EXAMPLES:
        assert len((ROOT / f"examples/{name}.py").read_text(encoding="utf-8").splitlines()) <= 70
        assert f"(../examples/{name}.py)" in (ROOT / "docs/own-loop.md").read_text(encoding="utf-8")
