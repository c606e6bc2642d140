"""A schedule rises and falls over exactly the steps that run."""

import pytest
import torch
from torch import nn

from resnet_fast.data import Augmentation, Batch
from resnet_fast.ops import augment
from resnet_fast.training import RECIPES, TrainConfig, TrainingStep
from resnet_fast.training.optimizer import make_optimizer
from resnet_fast.training.schedule import SCHEDULES


def rates(schedule: str, n_steps: int) -> list[float]:
    return [SCHEDULES[schedule](step, n_steps) for step in range(n_steps)]


@pytest.mark.parametrize("n_steps", [10, 270])
def test_one_cycle_is_torchs(n_steps: int):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0, momentum=0.9)
    oracle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=n_steps, cycle_momentum=False)
    expected = []
    for _ in range(n_steps):
        expected.append(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step() if len(expected) < n_steps else None
    assert rates("one-cycle", n_steps) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_triangular_goes_through_its_corners():
    values = rates("triangular", 100)
    assert values[0] == pytest.approx(0.2) and values[20] == 1.0 and values[60] == pytest.approx(0.5)
    assert values[99] == pytest.approx(1 / 80)
    assert SCHEDULES["triangular"](100, 100) == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n_steps", [1, 2, 3, 5, 1000])
def test_any_number_of_steps_has_positive_rates_up_to_the_peak(schedule: str, n_steps: int):
    values = rates(schedule, n_steps)
    assert min(values) > 0 and max(values) <= 1
    assert max(values) > 0.8 or n_steps < 5
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)


@pytest.mark.parametrize("n_steps", [10, 270])
def test_cosine_is_torchs(n_steps: int):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=n_steps)
    expected = []
    for _ in range(n_steps):
        expected.append(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step()
    assert rates("cosine", n_steps) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_constant_is_the_peak():
    assert rates("constant", 7) == [1.0] * 7


class Flat(nn.Module):
    """A batch norm, whose bias has a rate of its own, and two other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn(x).mean((2, 3)))


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreted kernel that augments the images takes longer than the steps."""
    monkeypatch.setattr(augment, "choose_backend", lambda x: "aten")


def used_rates(config: TrainConfig, n_steps: int) -> list[list[float]]:
    """The rate of each group of parameters in each step."""
    step = TrainingStep(Flat(), config, Augmentation((0.5,) * 3, (0.5,) * 3), n_steps)
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8).to(memory_format=torch.channels_last)
    batch = Batch(images, torch.zeros(4, dtype=torch.int64), torch.zeros(4, 6, dtype=torch.int32))
    used = []
    for _ in range(n_steps):
        announced = step.lr
        step(batch)
        used.append([float(group["lr"]) for group in step.optimizer.param_groups])
        assert used[-1][0] == pytest.approx(announced)
    return used


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_step_follows_the_schedule_and_ends_near_zero(schedule: str):
    used = used_rates(TrainConfig(dataset="digits", device="cpu", lr=0.5, schedule=schedule), 20)
    assert [rate for (rate,) in used] == pytest.approx([0.5 * value for value in rates(schedule, 20)])
    assert used[-1][0] < 0.05 or schedule == "constant"


def test_biases_of_batch_norms_have_their_own_rate_and_the_same_decay():
    config = TrainConfig(dataset="digits", device="cpu", lr=0.5, bn_bias_lr=64.0, weight_decay=1e-3)
    assert [other / rate for rate, other in used_rates(config, 10)] == pytest.approx([64.0] * 10)
    model = Flat()
    optimizer = make_optimizer(model, config)
    (others, biases) = (group["params"] for group in optimizer.param_groups)
    assert [id(p) for p in biases] == [id(model.bn.bias)] and len(others) == 3
    # A step subtracts lr·decay·weight: 64 times the rate, the same product.
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([1e-3, 1e-3 / 64])


@pytest.mark.parametrize(("momentum", "nesterov", "used"), [(0.9, True, True), (0.9, False, False), (0.0, True, False)])
def test_the_optimizer_is_what_was_asked_for(momentum: float, nesterov: bool, used: bool):
    config = TrainConfig(device="cpu", momentum=momentum, nesterov=nesterov, weight_decay=1e-3)
    optimizer = make_optimizer(nn.Linear(1, 1), config)
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (momentum, used, 1e-3)


def test_adam_is_torchs_with_its_defaults():
    config = TrainConfig(device="cpu", recipe="article")
    optimizer = make_optimizer(nn.Linear(1, 1), config)
    assert isinstance(optimizer, torch.optim.Adam)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)


@pytest.mark.parametrize("recipe", ["baseline", "article"])
def test_making_an_optimizer_moves_no_weight_and_leaves_its_state_at_zero(recipe: str):
    model = Flat()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = make_optimizer(model, RECIPES[recipe])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert states and all(not value.any() for value in states)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_steps_drop_where_the_paper_drops():
    values = rates("steps", 64_000)
    assert values[:32_000] == [1.0] * 32_000
    assert values[32_000:48_000] == [0.1] * 16_000
    assert values[48_000:] == [0.01] * 16_000
