"""The batch norm that reads every image once has PyTorch's results, and can be combined with the two-pass kernels."""

import functools
from dataclasses import replace

import pytest
import torch
from chosen import launched
from fused_op import Case, assert_agrees, make_operands, ours, results
from single_read import BACKWARD, BLOCK_C, BLOCK_M, BOTH, FORWARD, N_PROGRAMS, entries, reading_once

from resnet_fast.kernels import tiles
from resnet_fast.ops import BatchNormArgs, choices, launch, single_read
from resnet_fast.ops.arguments import arguments_of

BF16, FP16 = torch.bfloat16, torch.float16
# Two tiles of rows for each program: on a CPU 3 images.
PLAIN = Case("several tiles and splits, the last not full", (N_PROGRAMS * 2 * BLOCK_M // 81, BLOCK_C, 9, 9))
FORKED = replace(PLAIN, fork=True)
CORNERS = (
    Case("one image", (1, 16, 5, 5), fork=True),
    Case("channels a multiple of eight alone", (5, 24, 6, 6), fork=True),
    Case("several tiles of channels, the last not full", (2, 136, 7, 7)),
    Case("as many tiles of channels as programs", (3, N_PROGRAMS * BLOCK_C, 4, 4), fork=True),
    Case("one pixel per image", (33, 16, 1, 1)),
    Case("no affine, no running statistics", (2, 16, 5, 5), affine=False, running=False),
    Case("vectors in the type of x", (2, 16, 5, 5), vectors_as_x=True),
    Case("mean far beyond std", (4, 64, 9, 9), mean=300.0, std=0.5),
    Case("large std", (4, 16, 9, 9), std=1000.0),
)


@pytest.mark.parametrize("join", ("none", "add", "bn"))
@pytest.mark.parametrize(
    "case", (pytest.param(PLAIN, id="one handle", marks=pytest.mark.slow), pytest.param(FORKED, id="two handles"))
)
def test_every_join_agrees_with_pytorch(case, join, device):
    n_images, n_channels, height, width = case.shape
    cut = tiles.choose_single_read_tiles(n_images * height * width, n_channels, N_PROGRAMS, most_tiles=9)
    assert cut is not None and cut.tile.n_tiles.value == 2 and cut.n_parts > 1
    with reading_once(case, BF16, join):
        assert_agrees(make_operands(case, BF16, "channels_last", device), join, True)


@pytest.mark.parametrize(
    "case",
    [CORNERS[1], CORNERS[-2]]
    + [pytest.param(case, marks=pytest.mark.slow) for case in (CORNERS[0], *CORNERS[2:-2], CORNERS[-1])],
    ids=str,
)
def test_corners_agree_with_pytorch(case, device):
    with reading_once(case, BF16, "bn"):
        assert_agrees(make_operands(case, BF16, "channels_last", device), "bn", True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "join"),
    (
        pytest.param(FORKED, "none", id="none"),
        pytest.param(PLAIN, "add", id="add, whose dresidual may be dy itself"),
        pytest.param(FORKED, "bn", id="bn"),
    ),
)
def test_without_relu_and_in_fp16(case, join, device):
    for dtype, relu in ((BF16, False), (FP16, True)):
        with reading_once(case, dtype, join):
            assert_agrees(make_operands(case, dtype, "channels_last", device), join, relu)


@pytest.mark.slow
def test_two_runs_give_the_same_bits(device):
    join = "bn"
    operands = make_operands(FORKED, BF16, "channels_last", device)
    run = functools.partial(results, functools.partial(ours, fork=True), operands, join, True, "triton")
    with reading_once(FORKED, BF16, join):
        first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("operation", BOTH)
def test_it_goes_with_two_passes_in_the_other_direction(operation, device):
    join = "bn"
    with choices.using(entries(FORKED, BF16, join, (operation,))), launched() as kernels:
        assert_agrees(make_operands(FORKED, BF16, "channels_last", device), join, True)
    found = set(kernels) - {"combine_statistics_kernel", "combine_gradients_kernel"}  # of many splits
    if operation == "batch norm":
        assert found == {FORWARD, "reduce_kernel", "input_gradients_kernel"}
    else:
        assert found == {"statistics_kernel", "normalize_kernel", BACKWARD}


NOT_FINITE = (
    [1e30, -2e30],  # squares overflow
    [3e38, 2e38, -3e38],  # sums overflow
    [float("inf")],
    [float("inf"), float("-inf")],
    [float("nan")],
)


def test_channels_beyond_fp32_have_the_statistics_of_two_passes(device):
    """And leave the others alone."""
    x = make_operands(PLAIN, BF16, "channels_last", device).x
    for channel, values in enumerate(NOT_FINITE):
        for i, value in enumerate(values):
            x[i % 3, 5 + channel, i::4, 3] = value

    def forward(at) -> dict[str, torch.Tensor]:
        running = torch.zeros(64, device=device), torch.ones(64, device=device)
        found = at.forward(*arguments_of(x, BatchNormArgs(*running, training=True)))
        return {"y": found.y, "mean": found.mean, "rstd": found.rstd, "running_mean": running[0], "var": running[1]}

    found, expected = forward(single_read), forward(launch)
    for key, value in expected.items():
        # The sums' terms are the same in another order; y may round to the neighbor.
        rtol = 2**-7 if key == "y" else 1e-5
        torch.testing.assert_close(
            found[key], value, rtol=rtol, atol=1e-6, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_an_rstd_of_zero_ends_the_merge(device):
    """With an infinite eps; a loop until rstd is another than 0 would not end."""
    x = make_operands(PLAIN, BF16, "channels_last", device).x
    found = single_read.forward(*arguments_of(x, BatchNormArgs(None, None, training=True, eps=1e300), relu=False))
    assert not found.rstd.any() and not found.y.any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    (
        pytest.param(Case("", (2, 100, 4, 4)), BF16, "channels_last", id="channels not a multiple of eight"),
        pytest.param(
            Case("", (9, N_PROGRAMS * BLOCK_C + 8, 2, 2)), BF16, "channels_last", id="more channels than programs"
        ),
        pytest.param(replace(PLAIN, ghost=1), BF16, "channels_last", id="ghost batches"),
        pytest.param(replace(PLAIN, training=False), BF16, "channels_last", id="tracked statistics"),
        pytest.param(PLAIN, BF16, "nchw", id="NCHW"),
        pytest.param(PLAIN, torch.float32, "channels_last", id="fp32"),
    ),
)
def test_what_does_not_fit_takes_two_passes(case, dtype, layout, device):
    operands = make_operands(case, dtype, layout, device)
    run = functools.partial(results, functools.partial(ours, ghost=case.ghost), operands, "bn", True, "triton")
    expected = run()
    with choices.using(entries(case, dtype, "bn")), launched() as kernels:
        found = run()
    assert not {FORWARD, BACKWARD} & set(kernels)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
