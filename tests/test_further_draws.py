"""Erased rectangles, operations and mixtures are drawn as in torchvision, each part independently."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from resnet_fast.data import Augmentation, Loader, TensorSplit, epoch_plan
from resnet_fast.data.draws import ERASED, MIXED, N_COLUMNS, TRIVIAL
from resnet_fast.ops.trivial_augment import N_OPERATIONS, OPERATIONS

# isort: split
from torchvision.transforms.v2 import CutMix, RandomErasing

N_IMAGES, SIZE = 20000, (32, 24)
PLAIN = Augmentation((0.5,) * 3, (0.5,) * 3, crop=2, flip="random", cutout=3)
ALL = replace(PLAIN, trivial_augment=True, random_erasing=1.0, mixup=0.5, cutmix=1.0)
PARTS = {"order and crop": slice(0, 6), "erased": ERASED, "trivial": TRIVIAL, "mixed": MIXED}


def plan_of(augmentation: Augmentation = ALL, seed: int = 0, epoch: int = 1, n_images: int = N_IMAGES) -> Tensor:
    return epoch_plan(n_images, SIZE, augmentation, seed, epoch)


def weights_of(plan: Tensor) -> Tensor:
    return plan[:, MIXED.start].contiguous().view(torch.float32)


def assert_same_distribution(found: object, expected: object) -> None:
    """Kolmogorov's and Smirnov's test of two samples, at a level of 0.1 %."""
    a, b = (np.sort(np.asarray(values, np.float64)) for values in (found, expected))
    every = np.concatenate([a, b])
    distance = np.abs(np.searchsorted(a, every, "right") / len(a) - np.searchsorted(b, every, "right") / len(b)).max()
    assert distance < 1.95 * math.sqrt((len(a) + len(b)) / (len(a) * len(b)))


def test_a_plan_has_further_columns_only_where_they_are_needed():
    assert plan_of(PLAIN).shape == (N_IMAGES, 6)
    plan = plan_of()
    assert plan.shape == (N_IMAGES, N_COLUMNS) and plan.dtype == torch.int32


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        pytest.param({"random_erasing": 0.0}, {"erased"}, id="erasing"),
        pytest.param({"trivial_augment": False}, {"trivial"}, id="trivial augment"),
        pytest.param({"mixup": 0.0}, {"mixed"}, id="mixup"),
        pytest.param({"cutmix": 0.0}, {"mixed"}, id="cutmix"),
        pytest.param({"mixup": 0.0, "cutmix": 0.0, "trivial_augment": False}, {"mixed", "trivial"}, id="two"),
    ],
)
def test_switching_one_part_changes_that_part_alone(change: dict, parts: set[str]):
    before, after = plan_of(), plan_of(replace(ALL, **change))
    assert {name for name, part in PARTS.items() if not torch.equal(before[:, part], after[:, part])} == parts


def test_the_first_columns_are_those_without_further_ones():
    assert torch.equal(plan_of()[:, :6], plan_of(PLAIN))


def test_what_is_off_is_zero():
    assert not plan_of(replace(PLAIN, random_erasing=1.0))[:, TRIVIAL.start :].any()
    assert not plan_of(replace(PLAIN, trivial_augment=True))[:, ERASED].any()


def test_draws_are_a_function_of_seed_and_epoch_alone():
    plans = []
    for global_seed in (1, 2):
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        plans.append(plan_of(seed=3, epoch=5, n_images=100))
    assert torch.equal(*plans)
    for seed, epoch in ((3, 6), (4, 5)):
        other = plan_of(seed=seed, epoch=epoch, n_images=100)
        assert all(not torch.equal(plans[0][:, part], other[:, part]) for part in PARTS.values())


def test_erased_rectangles_are_drawn_as_torchvisions():
    found = plan_of()[:, ERASED].numpy()
    torch.manual_seed(0)
    transform = RandomErasing()
    drawn = [transform.make_params([torch.zeros(3, *SIZE)]) for _ in range(2000)]
    assert all(params["v"] is not None for params in drawn)
    for column, name in enumerate("ijhw"):
        assert_same_distribution(found[:, column], [params[name] for params in drawn])
    assert_same_distribution(found[:, 2] * found[:, 3], [params["h"] * params["w"] for params in drawn])
    for first, length, size in ((0, 2, SIZE[0]), (1, 3, SIZE[1])):
        assert (found[:, first] + found[:, length]).max() == size  # as far as the edge, and not beyond


def test_some_images_are_erased_and_what_does_not_fit_is_not():
    is_erased = plan_of(replace(ALL, random_erasing=0.3))[:, ERASED.stop - 1] > 0
    assert abs(int(is_erased.sum()) - 6000) < 5 * 65  # the standard deviation is 64.8
    assert not epoch_plan(50, (1, 32), ALL, 0, 1)[:, ERASED].any()  # a height of 1 is the whole height


def test_every_operation_and_strength_occurs_equally_often():
    operations, strengths = plan_of()[:, TRIVIAL].unbind(1)
    counts = torch.bincount(operations, minlength=N_OPERATIONS)
    assert len(counts) == len(OPERATIONS) and (counts - N_IMAGES / 14).abs().max() < 5 * 37  # standard deviation 36.4
    counts = torch.bincount(strengths + 30)
    counts[30] = counts[30].div(2, rounding_mode="floor")  # of both signs
    assert len(counts) == 61 and (counts - N_IMAGES / 62).abs().max() < 5 * 18  # standard deviation 17.8


def test_mixups_shares_are_of_the_beta_distribution():
    for alpha, quantile in ((1.0, lambda p: p), (0.5, lambda p: torch.sin(math.pi * p / 2) ** 2)):
        plan = plan_of(replace(PLAIN, mixup=alpha))
        levels = (torch.arange(N_IMAGES) + 0.5) / N_IMAGES
        assert_same_distribution(weights_of(plan), quantile(levels))
        assert torch.equal(plan[:, MIXED][:, 1:], torch.tensor([0, 0, *SIZE], dtype=torch.int32).expand(N_IMAGES, 4))


@pytest.mark.parametrize("alpha", [0.01, 100.0])
def test_the_least_and_the_largest_alpha_give_shares(alpha: float):
    weights = weights_of(plan_of(replace(PLAIN, mixup=alpha, cutmix=alpha)))
    assert ((weights >= 0) & (weights <= 1)).all()


def test_cutmixs_boxes_are_drawn_as_torchvisions():
    plan = plan_of(replace(PLAIN, cutmix=1.0))
    torch.manual_seed(0)
    transform = CutMix(num_classes=3)
    drawn = torch.tensor([transform.make_params([torch.zeros(2, 3, *SIZE)])["box"] for _ in range(2000)])
    left, top, right, bottom = drawn.unbind(1)
    expected = (top, left, bottom - top, right - left)
    for found, column in zip(plan[:, MIXED][:, 1:].unbind(1), expected, strict=True):
        assert_same_distribution(found, column)
    assert not weights_of(plan).any()


def test_with_both_a_batch_takes_one_of_the_two():
    plan = plan_of()
    is_mixup = weights_of(plan) > 0
    assert abs(int(is_mixup.sum()) - N_IMAGES / 2) < 5 * 71  # the standard deviation is 70.7
    is_whole = (plan[:, MIXED][:, 3:] == torch.tensor(SIZE)).all(1)
    assert is_whole[is_mixup].all() and not is_whole[~is_mixup].all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_batch_is_mixed_alike_on_all_processes(world_size: int):
    split = TensorSplit(torch.zeros(31, 3, *SIZE, dtype=torch.uint8), torch.zeros(31, dtype=torch.int64))
    loaders = [Loader(split, ALL, 8, 3, rank, world_size) for rank in range(world_size)]
    plan, first, mixtures = plan_of(seed=3, epoch=2, n_images=31), 0, []
    for share in zip(*(loader.epoch(2) for loader in loaders), strict=True):
        rows = torch.cat([batch.plan for batch in share])
        own = plan[first : first + len(rows)]
        assert torch.equal(rows[:, : MIXED.start], own[:, : MIXED.start])
        assert torch.equal(rows[:, MIXED], own[:1, MIXED].expand(len(rows), -1))
        mixtures.append(rows[0, MIXED].tolist())
        first += len(rows)
    assert mixtures[0] != mixtures[1]
