"""The single-read kernels write all of their outputs and nothing else, and move every image once."""

import functools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from fused_op import Case, make_operands, ours, results
from guard import guarded_memory
from interpreter import needs_interpreter
from ledger import ledger
from single_read import BACKWARD, FORWARD, entries, reading_once
from traffic import count, pivot_rows

from resnet_fast.ops import choices, launch, single_read

CASE = Case("several tiles and splits, the last not full", (2, 64, 9, 9), fork=True)
BF16 = torch.bfloat16

pytestmark = [pytest.mark.slow, needs_interpreter]


def step(case: Case, join: str, relu: bool = True) -> dict[str, torch.Tensor]:
    operands = make_operands(case, BF16, "channels_last", torch.device("cpu"))
    with choices.using(entries(case, BF16, join)):
        return results(functools.partial(ours, fork=case.fork), operands, join, relu, "triton")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("case", "relu", "join"),
    (
        pytest.param(CASE, True, "bn", id="two handles"),
        pytest.param(Case("", (3, 24, 5, 5)), True, "add", id="one handle, channels a multiple of eight alone"),
        pytest.param(Case("", (2, 16, 9, 9)), False, "none", id="one handle, no ReLU"),
    ),
)
def test_all_outputs_and_nothing_else_are_written(case, relu, join):
    with ledger(), guarded_memory() as kernels:
        found = step(case, join, relu)
    assert kernels == {FORWARD, BACKWARD}
    expected = step(case, join, relu)  # in bare memory, once the guard has let it pass
    for name in expected:
        assert not found[name].isnan().any() and torch.equal(found[name], expected[name]), name


def formula(case: Case, join: str) -> dict[str, Counter]:
    """kernels/README.md, "Single read", as `traffic.count` gives it, with ReLU."""
    n_images, n_channels, height, width = case.shape
    n_rows = n_images * height * width
    bn, add, fork = join == "bn", join != "none", case.fork  # as numbers: the operands that a join adds
    found = {}
    for kernel, operation, operands in (
        (
            FORWARD,
            "batch norm",
            {
                "images": (1 + add, 1),
                "bits": (0, add),
                "partials": (2 + 2 * bn,) * 2,
                "pivots": (1 + bn, 2 + 2 * bn),
                "vectors": (4 + 4 * bn,) * 2,
            },
        ),
        (
            BACKWARD,
            "batch norm backward",
            {
                "images": (2 + fork + bn, 1 + add),
                "bits": (add, 0),
                "partials": (2 + bn,) * 2,
                "vectors": (4 + 3 * bn, 2 + 2 * bn),
            },
        ),
    ):
        shape = launch.Shape(n_rows, n_channels, height * width, True, n_rows)
        tiling = single_read.choose_tiles(shape, operation, join, torch.device("cpu"))
        sizes = {
            "images": 2 * n_rows * n_channels,
            "bits": n_rows * n_channels // 8,
            "partials": 4 * tiling.n_parts * n_channels,
            "pivots": 4 * n_channels,
            "vectors": 4 * n_channels,
            "barrier": 4 * tiling.n_channel_tiles,
        }
        moved = Counter()
        for what, (reads, writes) in (operands | {"barrier": (1, 1)}).items():
            counted_as = "partials" if what == "pivots" else what
            moved[counted_as, "read"] += sizes[what] * reads
            moved[counted_as, "written"] += sizes[what] * writes
        found[kernel] = +moved
    return found


@pytest.mark.parametrize("join", ("none", "add", "bn"))
@pytest.mark.parametrize("case", (CASE, replace(CASE, fork=False)), ids=("two handles", "one handle"))
def test_the_bytes_are_those_of_the_formula(case, join):
    with ledger() as launches, reading_once(case, BF16, join):
        step(case, join)
    assert count(launches) == formula(case, join)
    n_rows = 2 * 81
    shape = launch.Shape(n_rows, 64, 81, True, n_rows)
    tiling = single_read.choose_tiles(shape, "batch norm", join, torch.device("cpu"))
    pivots = tiling.n_parts * np.bincount(pivot_rows(n_rows, tiling.tile.block_m.value), minlength=n_rows)
    for entry in launches:
        for name, account in entry.accounts.items():
            if account.what in ("images", "bits"):
                # Once more the rows for the pivots of what has statistics: not the residual of the add join.
                has_pivots = entry.kernel == FORWARD and (name == "x_ptr" or (name == "residual_ptr" and join == "bn"))
                once = has_pivots * pivots[:, None] + account.times["read"].any()
                assert (account.times["read"].reshape(n_rows, -1) == once).all(), name
                assert account.times["written"].max() <= 1, name


@pytest.mark.parametrize(
    ("join", "fork", "forward", "backward"),
    (
        ("none", False, 4, 6),
        ("none", True, 4, 8),
        ("add", True, 6 + 1 / 8, 10 + 1 / 8),
        ("bn", True, 6 + 1 / 8, 12 + 1 / 8),
    ),
)
def test_bytes_per_element(join, fork, forward, backward):
    """The table of kernels/README.md, "Single read"."""
    moved = formula(replace(CASE, fork=fork), join)
    n_elements = 2 * 81 * 64
    for kernel, expected in ((FORWARD, forward), (BACKWARD, backward)):
        size = sum(size for (what, _), size in moved[kernel].items() if what in ("images", "bits"))
        assert size == expected * n_elements
