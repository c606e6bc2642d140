"""A schedule goes up and down over exactly the steps that are run."""

import pytest
import torch
from torch import nn

from resnet_fast.training import TrainConfig
from resnet_fast.training.loop import make_optimizer, make_scheduler
from resnet_fast.training.schedule import SCHEDULES


def rates(schedule: str, n_steps: int) -> list[float]:
    return [SCHEDULES[schedule](step, n_steps) for step in range(n_steps)]


@pytest.mark.parametrize("n_steps", [10, 270, 1173])
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
@pytest.mark.parametrize("n_steps", [1, 2, 3, 4, 5, 7, 1000])
def test_any_number_of_steps_has_positive_rates_up_to_the_peak(schedule: str, n_steps: int):
    values = rates(schedule, n_steps)
    assert min(values) > 0 and max(values) <= 1
    assert max(values) > 0.8 or n_steps < 5
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_scheduler_follows_the_schedule_and_ends_near_zero(schedule: str):
    model = nn.Linear(1, 1)
    config = TrainConfig(dataset="digits", epochs=4, lr=0.5, schedule=schedule)
    optimizer = make_optimizer(model, config)
    scheduler = make_scheduler(optimizer, config, steps_per_epoch=25)
    used = []
    for _ in range(100):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert used == pytest.approx([0.5 * value for value in rates(schedule, 100)])
    assert used[-1] < 0.01


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.0, False)])
def test_the_optimizer_is_what_was_asked_for(momentum: float, nesterov: bool):
    group = make_optimizer(nn.Linear(1, 1), TrainConfig(momentum=momentum, weight_decay=1e-3)).param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (momentum, nesterov, 1e-3)
