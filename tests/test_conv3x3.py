"""The 3x3 convolution and its gradients are those of PyTorch, within the error budget of each type."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from torch import Tensor

from resnet_fast.convolution import has_kernels
from resnet_fast.kernels.conv_tiles import (
    PROGRAMS,
    SPLIT_K_PROGRAMS,
    ConvTiles,
    conv_candidates,
    weight_gradient_candidates,
)
from resnet_fast.ops import conv3x3

LIBRARY = torch.ops.aten.convolution_backward

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Case(NamedTuple):
    name: str
    n_images: int
    in_channels: int
    out_channels: int
    width: int

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("32x32, 16 channels to 32", 1, 16, 32, 32),
    Case("8x8, narrowing", 1, 128, 64, 8),
    Case("8x8, multiples of 16 alone", 3, 48, 80, 8),
    Case("4x4, one image, less than a tile", 1, 32, 16, 4),
)


# Every case in bf16, one in the other types, fp32 among them, where nothing but the order of a sum tells two
# implementations apart.
TYPED = pytest.mark.parametrize(
    ("case", "dtype"),
    [(CASES[-1], torch.bfloat16), (CASES[2], torch.bfloat16)]
    + [pytest.param(case, torch.bfloat16, marks=pytest.mark.slow) for case in CASES[:2]]
    + [pytest.param(CASES[2], dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float32)],
    ids=str,
)


class Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    dy: Tensor


def operands(case: Case, dtype: torch.dtype, device: torch.device) -> Operands:
    generator = torch.Generator().manual_seed(case.n_images)

    def image(n_channels: int) -> Tensor:
        values = torch.randn(case.n_images, n_channels, case.width, case.width, generator=generator)
        return channels_last(values.to(device, dtype))

    weight = torch.randn(case.out_channels, case.in_channels, 3, 3, generator=generator) / case.in_channels**0.5
    return Operands(image(case.in_channels), channels_last(weight.to(device, dtype)), image(case.out_channels))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def gradient(of: int, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    """PyTorch's gradient of x (0) or of the weight (1)."""
    return LIBRARY(dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [of == 0, of == 1, False])[of]


def cuts(in_channels: int, out_channels: int) -> list[ConvTiles]:
    """The first and the last candidate, of one tile a program and of several, and the first with the other operands."""
    found = conv_candidates(in_channels, out_channels, n_rows=1)
    other = found[0]._replace(channels_as_rows=not found[0].channels_as_rows)
    return [found[0], found[-1]._replace(per_program=3), other]


@TYPED
def test_convolution(case, dtype, device):
    x, weight, _ = operands(case, dtype, device)
    eager, exact, added = (
        F.conv2d(x, weight, padding=1),
        F.conv2d(x.double(), weight.double(), padding=1),
        F.conv2d(x.double().abs(), weight.double().abs(), padding=1),
    )
    for tiles in cuts(case.in_channels, case.out_channels):
        y, _ = conv3x3.forward(x, weight, tiles)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_within_budget("y", y, eager, exact, added)


@TYPED
def test_data_gradient(case, dtype, device):
    x, weight, dy = operands(case, dtype, device)
    eager, exact, added = (
        gradient(0, x, weight, dy),
        gradient(0, x.double(), weight.double(), dy.double()),
        gradient(0, x.double(), weight.double().abs(), dy.double().abs()),
    )
    for tiles in cuts(case.out_channels, case.in_channels):
        dx, sums = conv3x3.data_gradient(dy, weight, tiles)
        assert sums is None and dx.is_contiguous(memory_format=torch.channels_last)
        assert_within_budget("dx", dx, eager, exact, added)


@TYPED
def test_weight_gradient(case, dtype, device):
    x, weight, dy = operands(case, dtype, device)
    exact = gradient(1, x.double(), weight.double(), dy.double())
    added = gradient(1, x.double().abs(), weight.double(), dy.double().abs())
    first, *_, last = weight_gradient_candidates(case.in_channels, case.out_channels, case.n_images * case.width**2)
    whole = first._replace(per_program=10_000)  # one part: no second kernel
    eager = gradient(1, x, weight, dy)
    for tiles in (first, whole):
        dweight = conv3x3.weight_gradient(x, dy, tiles, dtype)
        assert dweight.is_contiguous(memory_format=torch.channels_last)
        assert_within_budget("dweight", dweight, eager, exact, added)
    dweight = conv3x3.weight_gradient(x, dy, last, torch.float32)  # as of parameters under autocast: no second rounding
    assert_within_budget("dweight in fp32", dweight, gradient(1, x.float(), weight.float(), dy.float()), exact, added)


def test_two_runs_give_the_same_bits(device):
    case = CASES[3]
    x, weight, dy = operands(case, torch.bfloat16, device)
    *_, tiles = cuts(case.in_channels, case.out_channels)
    of_weight = weight_gradient_candidates(case.in_channels, case.out_channels, case.n_images * case.width**2)[0]

    def run() -> list[Tensor]:
        y, statistics = conv3x3.forward(x, weight, tiles)
        return [y, statistics.partials, conv3x3.weight_gradient(x, dy, of_weight, torch.float32)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("shape", "n_out", "different"),
    (
        ((2, 16, 7, 7), 16, {}),  # no power of two
        ((2, 16, 64, 64), 16, {}),  # wider than a tile's lines
        ((2, 16, 8, 16), 16, {}),  # not square
        ((2, 24, 8, 8), 16, {}),  # no multiple of 16
        ((2, 16, 8, 8), 24, {}),
        ((0, 16, 8, 8), 16, {}),
        ((2, 16, 8, 8), 16, {"stride": (2, 2)}),
        ((2, 16, 8, 8), 16, {"padding": (0, 0)}),
        ((2, 16, 8, 8), 16, {"dilation": (2, 2), "padding": (2, 2)}),
        ((2, 16, 8, 8), 16, {"bias": torch.zeros(16)}),
    ),
    ids=str,
)
def test_what_the_kernels_do_not_take(shape, n_out, different):
    as_they_do = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    assert not has_kernels(torch.empty(shape), torch.empty(n_out, shape[1], 3, 3), **as_they_do | different)
    assert has_kernels(torch.empty(2, 16, 8, 8), torch.empty(16, 16, 3, 3), **as_they_do)


@pytest.mark.parametrize(
    ("n_in", "n_out", "n_rows"), ((16, 16, 16), (48, 80, 2048), (64, 64, 1_048_576), (512, 512, 131_072))
)
def test_no_candidate_starts_far_more_programs_than_wanted(n_in, n_out, n_rows):
    for tiles in conv_candidates(n_in, n_out, n_rows):
        n_row_tiles, n_channel_tiles = -(-n_rows // tiles.block_m), -(-n_out // tiles.block_n)
        assert -(-n_row_tiles // tiles.per_program) * n_channel_tiles <= PROGRAMS[-1] + n_channel_tiles
    for tiles in weight_gradient_candidates(n_in, n_out, n_rows):
        n_tiles = 9 * -(-n_out // tiles.block_m) * -(-n_in // tiles.block_n)
        n_parts = -(-n_rows // (tiles.block_k * tiles.per_program))
        assert n_parts * n_tiles <= max(SPLIT_K_PROGRAMS[-1], n_tiles)
