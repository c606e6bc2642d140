"""fp16's loss scale equals torch.amp.GradScaler's at each step; a skipped step changes only what is documented."""

import copy
import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from recorded_graph import RecordedGraph
from tiny_run import config_for, equal, make_dataset, stop, use_tiny
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from resnet_fast.data import Augmentation, Batch, Loader
from resnet_fast.ops import augment as augment_module
from resnet_fast.training import RECIPES, Recipe, ResumeError, TrainingStep, checkpoint, resume, train
from resnet_fast.training import step as step_module
from resnet_fast.training.console import PlainReporter
from resnet_fast.training.graph import CudaGraph
from resnet_fast.training.loss_scale import make_scaler
from resnet_fast.training.optimizer import make_optimizer
from resnet_fast.training.schedule import SCHEDULES
from resnet_fast.training.step import training_step

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
AUGMENTATION = Augmentation((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), crop=2, padding="reflect", flip="random")
SGD = replace(RECIPES["fast94"], batch_size=8, label_smoothing=0.1)
ADAM = replace(SGD, optimizer="adam", lr=1e-2)
N_STEPS, INTERVAL, SCALE = 16, 3, 1024.0
OVERFLOWS = {0, 5, 6, 11}  # of the steps; between them 4, 0 and 4 good ones, of which 3 let the scale grow


@pytest.fixture(autouse=True)
def same_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in for a graph sees operators alone, and cuDNN may choose another algorithm every time."""
    monkeypatch.setattr(augment_module, "choose_backend", lambda x: "aten")
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        yield


class Amplified(torch.autograd.Function):
    """Multiplies the gradient by a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        return gradient * ctx.saved_tensors[0], None


class Small(nn.Module):
    """A network whose gradients leave fp16's range while `factor` is large; its outputs do not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 3)
        self.factor = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        y = Amplified.apply(self.conv(x), self.factor)
        return self.fc(self.bn(y).relu().mean((2, 3)))

    def overflow_at(self, i: int) -> None:
        self.factor.fill_(6e4 if i in OVERFLOWS else 1)


def make_model(device: torch.device = CPU) -> Small:
    torch.manual_seed(0)
    model = Small().train().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.factor = model.factor.to(device)
    return model


def make_step(recipe: Recipe, device: torch.device = CPU, **settings: Any) -> TrainingStep:
    make_graph = CudaGraph if device.type == "cuda" else RecordedGraph
    settings = {"precision": "fp16", "make_graph": make_graph, **settings}
    step = TrainingStep(make_model(device), recipe, AUGMENTATION, n_steps=N_STEPS, **settings)
    step.scaler.set_growth_interval(INTERVAL)
    step.scaler.update(SCALE)
    return step


def batches(device: torch.device = CPU) -> list[Batch]:
    loader = Loader(make_dataset(N_STEPS * 4).train.to(device), AUGMENTATION, 8)
    return [batch for epoch in (1, 2) for batch in loader.epoch(epoch)]


def run(step: TrainingStep, i: int, batch: Batch) -> None:
    cast(Small, step.model).overflow_at(i)
    step(batch)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: GradScaler) -> list:
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"], scaler.state_dict()])


def a_plain_loop(recipe: Recipe, n_parts: int, device: torch.device) -> list:
    """As torch's documentation writes it, with a scaler of its own; the state after every step."""
    model = make_model(device)
    # It begins from a momentum of zero: else a first step that overflows leaves fused SGD one of uninitialized memory.
    optimizer = make_optimizer(model, recipe)
    scaler, seen = GradScaler(device.type, init_scale=SCALE, growth_interval=INTERVAL), []
    for i, batch in enumerate(batches(device)):
        model.overflow_at(i)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(recipe.lr * SCHEDULES[recipe.schedule](i, N_STEPS), device=device)
        optimizer.zero_grad()
        for plan in batch.plan.chunk(n_parts):
            images, labels = batch._replace(plan=plan).augmented(AUGMENTATION, torch.float16)
            with torch.autocast(device.type, torch.float16):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
            scaler.scale(loss / n_parts).backward()
        if recipe.clip_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        seen.append(state_of(model, optimizer, scaler))
    return seen


CASES = {
    "SGD": (SGD, 1),
    "SGD with clipping": (replace(SGD, clip_norm=0.1), 1),
    "Adam": (ADAM, 1),
    "Adam with clipping": (replace(ADAM, clip_norm=0.1), 1),
    "in two parts": (SGD, 2),
}


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize(("recipe", "n_parts"), CASES.values(), ids=CASES)
def test_steps_and_scales_are_those_of_a_loop_with_torchs_scaler(
    recipe: Recipe, n_parts: int, graph: bool, device: torch.device
):
    expected = a_plain_loop(recipe, n_parts, device)
    step = make_step(recipe, device, accumulate=n_parts, graph=graph)
    for i, batch in enumerate(batches(device)):
        run(step, i, batch)
        assert equal(state_of(step.model, step.optimizer, step.scaler), expected[i]), i
    assert step.n_skipped == len(OVERFLOWS)
    scales = [state[2]["scale"] / SCALE for state in expected]
    assert scales == [0.5, 0.5, 0.5, 1, 1, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("recipe", [replace(SGD, ema=0.9), replace(ADAM, ema=0.9, clip_norm=0.1)], ids=["SGD", "Adam"])
def test_a_skipped_step_moves_the_statistics_and_the_rate_alone(recipe: Recipe):
    step, n_checked = make_step(recipe), 0
    norm = cast(Small, step.model).bn
    for i, batch in enumerate(batches()):
        weights = copy.deepcopy(dict(step.model.named_parameters()))
        mean, state = copy.deepcopy((norm.running_mean, step.state_dict()))
        run(step, i, batch)
        after = step.state_dict()
        is_same = [equal(dict(step.model.named_parameters()), weights)]
        is_same += [equal(after["optimizer"]["state"], state["optimizer"]["state"])]
        is_same += [equal(after["average"], state["average"])]
        assert is_same == [i in OVERFLOWS] * 3
        assert norm.num_batches_tracked == i + 1 == after["n_done"]
        assert not equal(norm.running_mean, mean)
        n_checked += is_same[0]
    assert n_checked == step.n_skipped == len(OVERFLOWS)


def test_the_average_is_that_of_the_steps_that_were_made():
    step, kept = make_step(replace(SGD, ema=0.5)), []
    for i, batch in enumerate(batches()):
        run(step, i, batch)
        kept += [] if i in OVERFLOWS else [copy.deepcopy(step.model.state_dict())]
    weights = torch.tensor([0.5 ** (len(kept) - k) for k in range(len(kept))], dtype=torch.float64)
    for name, value in step.averaged().items():
        if value.is_floating_point():
            exact = (torch.stack([state[name].double() for state in kept], -1) * weights).sum(-1) / weights.sum()
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)  # a few roundings of fp32 per step


def test_an_optimizer_that_is_not_fused_makes_the_same_steps():
    """It waits for the gradients, and is not recorded, as test_graphed.py shows."""
    found = []
    for fused in (True, False):
        model, scaler = make_model(), make_scaler("fp16", CPU)
        scaler.set_growth_interval(INTERVAL)
        scaler.update(SCALE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        for i, batch in enumerate(batches()):
            model.overflow_at(i)
            training_step(model, optimizer, *batch.augmented(AUGMENTATION, torch.float16), "fp16", scaler)
        found.append((model.state_dict(), scaler.state_dict()))
    (weights, scale), (theirs, their_scale) = found
    assert scale == their_scale
    for name, value in weights.items():
        # The two round their fp32 sums in another order, which may move a rounding to fp16.
        torch.testing.assert_close(value, theirs[name], rtol=2**-9, atol=2**-9)


@pytest.mark.parametrize("at", [1, 3, 6, 8, 12])
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "recorded"])
def test_a_step_goes_on_from_the_middle_of_a_growth_interval(at: int, graph: bool, device: torch.device):
    straight, stopped, resumed = (make_step(replace(SGD, ema=0.9), device, graph=graph) for _ in range(3))
    all_batches = batches(device)
    for _ in range(3):  # steps, and a graph, of before, with a scale of their own
        run(resumed, 0, all_batches[0])
    for i, batch in enumerate(all_batches):
        run(straight, i, batch)
        if i < at:
            run(stopped, i, batch)
        if i == at:
            resumed.model.load_state_dict(stopped.model.state_dict())
            resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
        if i >= at:
            run(resumed, i, batch)
    assert equal(resumed.model.state_dict(), straight.model.state_dict())
    assert equal(resumed.state_dict(), straight.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_have_no_scale(precision: str):
    step = make_step(SGD, precision=precision)
    run(step, 1, batches()[1])
    assert "scaler" not in step.state_dict() and step.n_skipped == 0


# Of a run.


def test_skipped_steps_are_counted_recorded_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    use_tiny(monkeypatch.setattr)
    scalers = []

    def make_high(*args: Any) -> GradScaler:
        scalers.append(make_scaler(*args))
        scalers[0].update(2.0**24)
        return scalers[0]

    monkeypatch.setattr(step_module, "make_scaler", make_high)
    result = train(config_for(tmp_path / "run", precision="fp16"), PlainReporter())
    counts = [metrics.skipped_steps for metrics in result.history]
    assert counts[0] == 5 and counts[2] == 0  # all of the first epoch's, none of the last one's
    assert scalers[0].get_scale() == 2.0 ** (24 - sum(counts))
    with open(tmp_path / "run" / "metrics.csv") as file:
        assert [int(row["skipped_steps"]) for row in csv.DictReader(file)] == counts
    lines = capsys.readouterr().out.splitlines()
    first, second = (i for i, line in enumerate(lines) if "overflowed" in line)
    assert [lines[first].strip(), lines[second].strip()] == [
        f"{counts[0]} steps skipped: gradients overflowed in fp16",
        f"{counts[1]} step{'s' if counts[1] > 1 else ''} skipped: gradients overflowed in fp16",
    ]
    assert lines[first - 1].strip().startswith("1/3") and lines[second - 1].strip().startswith("2/3")


def change(path: Path, edit: Callable[[dict], object]) -> None:
    state = torch.load(path, weights_only=True)
    edit(state)
    checkpoint.write_checkpoint(path, state, None)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda scaler: scaler.update(scale=float("nan")),
            "step.scaler.scale must be in .*, the range of fp32, got nan",
        ),
        (
            lambda scaler: scaler.update(scale=float("inf")),
            "step.scaler.scale must be in .*, the range of fp32, got inf",
        ),
        (lambda scaler: scaler.update(scale=0.0), "step.scaler.scale must be in .*, the range of fp32, got 0.0"),
        (lambda scaler: scaler.update(scale=1e39), r"step.scaler.scale must be in .*, the range of fp32, got 1e\+39"),
        (lambda scaler: scaler.update(scale="1"), "step.scaler.scale must be 65536.0, got '1'"),
        (lambda scaler: scaler.update(_growth_tracker=2000), "_growth_tracker must be an integer, 0 … 1,999, got 2000"),
        (lambda scaler: scaler.update(_growth_tracker=-1), "_growth_tracker must be an integer, 0 … 1,999, got -1"),
        (lambda scaler: scaler.pop("scale"), "step.scaler holds no scale"),
        (lambda scaler: scaler.clear(), "step.scaler holds no scale"),
    ],
)
def test_a_scale_that_cannot_be_is_refused(
    edit: Callable, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    use_tiny(monkeypatch.setattr)
    out = stop(tmp_path / "run", 2, precision="fp16")
    change(out / "checkpoint.pt", lambda state: edit(state["step"]["scaler"]))
    with pytest.raises(ResumeError, match=message):
        resume(out)


def test_a_run_in_fp16_needs_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_tiny(monkeypatch.setattr)
    out = stop(tmp_path / "run", 2, precision="fp16")
    change(out / "checkpoint.pt", lambda state: state["step"].pop("scaler"))
    with pytest.raises(ResumeError, match="step holds no scaler"):
        resume(out)


def test_a_checkpoint_does_not_set_how_the_scale_grows():
    step = make_step(SGD)
    state = step.state_dict()
    state["scaler"] |= {"growth_factor": 100.0, "growth_interval": 1, "backoff_factor": 0.9}
    before = step.scaler.state_dict()
    step.load_state_dict(state)
    assert step.scaler.state_dict() == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_of_before_goes_on(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its epochs have no count of skipped steps, and its state no scale."""
    use_tiny(monkeypatch.setattr)
    out = stop(tmp_path / "run", 2, precision=precision)

    def as_before(state: dict) -> None:
        assert "scaler" not in state["step"]
        for metrics in state["history"]:
            del metrics["skipped_steps"]

    change(out / "checkpoint.pt", as_before)
    result = resume(out)
    assert [metrics.skipped_steps for metrics in result.history] == [0, 0, 0]
