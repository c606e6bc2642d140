"""A plan depends only on seed and epoch, its parts are independent, and processes share it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from resnet_fast.data import Augmentation, Loader, TensorSplit, epoch_plan

INDEX, SHIFT_Y, SHIFT_X, MIRROR, CUT_Y, CUT_X = range(6)
N_IMAGES, SIZE = 1000, (7, 9)
ALL = Augmentation((0.5,) * 3, (0.5,) * 3, crop=2, flip="random", cutout=3)


def plan_of(augmentation: Augmentation = ALL, seed: int = 0, epoch: int = 1, n_images: int = N_IMAGES) -> Tensor:
    return epoch_plan(n_images, SIZE, augmentation, seed, epoch)


def by_image(plan: Tensor, column: int) -> Tensor:
    """A column in the order of the data set."""
    return plan[plan[:, INDEX].argsort(), column]


def test_every_image_is_there_once_and_every_draw_in_its_range():
    plan = plan_of()
    assert plan.shape == (N_IMAGES, 6) and plan.dtype == torch.int32
    assert plan[:, INDEX].sort().values.tolist() == list(range(N_IMAGES))
    largest = {SHIFT_Y: 4, SHIFT_X: 4, MIRROR: 1, CUT_Y: 7 - 3, CUT_X: 9 - 3}
    for column, value in largest.items():
        assert set(plan[:, column].tolist()) == set(range(value + 1)), column


@pytest.mark.parametrize(
    ("change", "largest"),
    [
        pytest.param({"crop": 0}, {SHIFT_Y: 0, SHIFT_X: 0}, id="no crop"),
        pytest.param({"flip": "none"}, {MIRROR: 0}, id="no flip"),
        pytest.param({"cutout": 7}, {CUT_Y: 0, CUT_X: 2}, id="cutout of one side"),
        pytest.param({"cutout": 20}, {CUT_Y: 0, CUT_X: 0}, id="cutout of more than the image"),
    ],
)
def test_what_is_not_there_to_draw_is_zero(change: dict, largest: dict[int, int]):
    plan = plan_of(replace(ALL, **change))
    assert {column: int(plan[:, column].max()) for column in largest} == largest


@pytest.mark.parametrize("flip", ["none", "random", "alternating"])
def test_a_plan_is_a_function_of_seed_and_epoch_alone(flip: str):
    augmentation = replace(ALL, flip=flip)
    plans = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        plans.append(plan_of(augmentation, seed=3, epoch=5))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*plans)
    for seed, epoch in ((3, 6), (4, 5), (5, 3)):
        assert not torch.equal(plan_of(augmentation, seed, epoch)[:, INDEX], plans[0][:, INDEX])


@pytest.mark.parametrize("seed", [2**32, 2**32 + 1, 2**40, 2**64 - 1, 2**64])
def test_every_bit_of_a_seed_counts(seed: int):
    plan = plan_of(seed=seed)
    for other in {seed % 2**32, seed - 1, seed + 2**32} - {seed}:
        assert not torch.equal(plan, plan_of(seed=other))


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        pytest.param({"crop": 0}, {SHIFT_Y, SHIFT_X}, id="crop"),
        pytest.param({"flip": "none"}, {MIRROR}, id="flip"),
        pytest.param({"flip": "alternating"}, {MIRROR}, id="alternating"),
        pytest.param({"cutout": 0}, {CUT_Y, CUT_X}, id="cutout"),
        pytest.param({"padding": "reflect"}, set(), id="padding"),
        pytest.param({"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}, set(), id="normalization"),
    ],
)
def test_switching_one_part_changes_that_part_alone(change: dict, columns: set[int]):
    before, after = plan_of(), plan_of(replace(ALL, **change))
    changed = {column for column in range(6) if not torch.equal(before[:, column], after[:, column])}
    assert changed == columns


@pytest.mark.parametrize("epoch", [1, 2, 3, 17])
def test_two_epochs_show_each_image_both_ways(epoch: int):
    first, second, third = (
        by_image(plan_of(replace(ALL, flip="alternating"), 0, e), MIRROR) for e in range(epoch, epoch + 3)
    )
    assert torch.equal(first + second, torch.ones_like(first))
    assert torch.equal(first, third)
    assert abs(int(first.sum()) - N_IMAGES / 2) < 5 * 16  # the standard deviation is 15.8


def test_a_random_flip_is_drawn_anew():
    first, second = (by_image(plan_of(epoch=epoch), MIRROR) for epoch in (1, 2))
    assert abs(int(first.sum()) - N_IMAGES / 2) < 5 * 16
    assert abs(int((first == second).sum()) - N_IMAGES / 2) < 5 * 16


def test_which_half_is_mirrored_first_is_the_seeds():
    halves = [by_image(plan_of(replace(ALL, flip="alternating"), seed), MIRROR) for seed in (0, 1)]
    assert abs(int((halves[0] == halves[1]).sum()) - N_IMAGES / 2) < 5 * 16


@pytest.mark.parametrize("n_images", [24, 29, 31])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_shares_of_all_processes_are_the_batch_of_one(world_size: int, n_images: int):
    split = TensorSplit(torch.zeros(n_images, 3, *SIZE, dtype=torch.uint8), torch.zeros(n_images, dtype=torch.int64))
    loaders = [Loader(split, ALL, 8, 3, rank, world_size) for rank in range(world_size)]
    plan = plan_of(seed=3, epoch=2, n_images=n_images)
    shares = zip(*(loader.epoch(2) for loader in loaders), strict=True)
    sizes = loaders[0].batch_sizes()
    for rows, share in zip(plan[: sum(sizes)].split(sizes), shares, strict=True):
        assert torch.equal(torch.cat([batch.plan for batch in share]), rows)
        own = [len(batch.plan) for batch in share]
        assert max(own) - min(own) <= 1 and min(own) >= 2
