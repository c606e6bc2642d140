"""The 3x3 convolution and its data gradient are those of PyTorch, within the error budget of each type."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from chosen import TILES
from torch import Tensor

from resnet_fast.kernels.conv_tiles import N_MULTIPROCESSORS, ConvTiles, conv_candidates
from resnet_fast.ops import BatchNormArgs, conv3x3, launch
from resnet_fast.ops.arguments import Saved, arguments_of
from resnet_fast.pairs import has_kernels, library_gradients

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


def data_gradient(x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    """PyTorch's gradient of x."""
    dx, _ = library_gradients(dy, x, weight, True, False)
    assert dx is not None
    return dx


def saved_by(x: Tensor, join: str = "none") -> tuple[Tensor, Saved]:
    """The output of a batch norm of x with this join, which the convolution reads, and what its forward has saved."""
    generator = torch.Generator().manual_seed(7)

    def norm() -> BatchNormArgs:
        weight, bias = torch.rand(2, x.shape[1], generator=generator) + torch.tensor([[0.5], [-0.5]])
        return BatchNormArgs(None, None, weight.to(x.device), bias.to(x.device), training=True)

    residual = channels_last(torch.randn(x.shape, generator=generator).to(x.device, x.dtype))
    arguments = arguments_of(x, norm(), None if join == "none" else residual, norm() if join == "bn" else None)
    outputs = launch.forward(*arguments)
    return outputs.y, Saved.of(*arguments, outputs)


def cuts(in_channels: int, out_channels: int, with_sums: bool, x: Tensor) -> list[ConvTiles]:
    """The first and the last candidate that x's type and device have the shared memory for, of one tile a program and
    of several. They are made for 16-bit types: in fp32 there may be none, and small blocks take their place.
    """
    found = conv_candidates(in_channels, out_channels, 1, with_sums)
    found = [tiles for tiles in found if conv3x3.fits(tiles, x.dtype, x.device)] or [TILES]
    return [found[0]._replace(per_program=1), found[-1]._replace(per_program=3)]


@TYPED
def test_convolution(case, dtype, device):
    x, weight, _ = operands(case, dtype, device)
    eager, exact, added = (
        F.conv2d(x, weight, padding=1),
        F.conv2d(x.double(), weight.double(), padding=1),
        F.conv2d(x.double().abs(), weight.double().abs(), padding=1),
    )
    for tiles in cuts(case.in_channels, case.out_channels, with_sums=False, x=x):
        y, _ = conv3x3.forward(x, weight, tiles)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_within_budget("y", y, eager, exact, added)


@TYPED
def test_data_gradient(case, dtype, device):
    """Taken through the ReLU of the batch norm whose output the convolution reads."""
    x, weight, dy = operands(case, dtype, device)
    y, saved = saved_by(x)
    eager, exact, added = (
        gradient.masked_fill(y <= 0, 0)
        for gradient in (
            data_gradient(x, weight, dy),
            data_gradient(x.double(), weight.double(), dy.double()),
            data_gradient(x.double(), weight.double().abs(), dy.double().abs()),
        )
    )
    for tiles in cuts(case.out_channels, case.in_channels, with_sums=True, x=x):
        dz, _, _ = conv3x3.data_gradient(dy, weight, tiles, saved, None)
        assert dz.is_contiguous(memory_format=torch.channels_last)
        assert_within_budget("dz", dz, eager, exact, added)


def test_two_runs_give_the_same_bits(device):
    case = CASES[3]
    x, weight, dy = operands(case, torch.bfloat16, device)
    _, saved = saved_by(x)
    tiles = cuts(case.in_channels, case.out_channels, with_sums=False, x=x)[-1]
    of_gradient = cuts(case.out_channels, case.in_channels, with_sums=True, x=x)[-1]

    def run() -> list[Tensor]:
        y, statistics = conv3x3.forward(x, weight, tiles)
        return [y, statistics.partials, *conv3x3.data_gradient(dy, weight, of_gradient, saved, None)[:2]]

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
@pytest.mark.parametrize("with_sums", (False, True), ids=("forward", "data gradient"))
def test_few_candidates_of_no_more_programs_than_run_at_once(with_sums, n_in, n_out, n_rows):
    found = conv_candidates(n_in, n_out, n_rows, with_sums)
    assert 2 <= len(set(found)) == len(found) <= 3
    for tiles in found:
        n_row_tiles, n_channel_tiles = -(-n_rows // tiles.block_m), -(-n_out // tiles.block_n)
        n_programs = -(-n_row_tiles // tiles.per_program) * n_channel_tiles
        assert n_programs <= 2 * N_MULTIPROCESSORS + n_channel_tiles
