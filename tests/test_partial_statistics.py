"""Partial statistics: constant channels are exact and outliers cost no digits, for any splits and order of merging."""

import statistics

import pytest
import torch
from fused_op import LAYOUTS
from torch import Tensor
from traffic import pivot_rows

from resnet_fast.kernels import tiles
from resnet_fast.ops import BatchNormArgs, launch
from resnet_fast.ops.arguments import accumulation_type, arguments_of

SHAPE = (5, 24, 9, 9)  # 405 rows: the last split and the last tile are not full
NORM = BatchNormArgs(None, None, training=True)
DTYPES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64), ids=str)
# Terms of one sign, each rounded a few times, summed in pairs: independent roundings add up to less than eight.
ROUNDINGS = 8


@pytest.fixture(params=(1, 3, 256), ids=lambda n_splits: f"{n_splits} splits at most")
def splits(request, monkeypatch) -> None:
    """One split; several, of several steps each; and splits of one step."""
    monkeypatch.setattr(tiles, "STATISTICS_PROGRAMS", request.param)


def image(values: Tensor, dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    return values.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])


def by_combine_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, [C] in fp64."""
    shape, var = launch.Shape.of(x), x.new_empty(1, x.shape[1], dtype=torch.float64)
    mean, _ = launch.combine_statistics(launch.partial_statistics(x, shape), NORM, shape, var)
    return mean[0].double(), var[0]


def by_second_pass(x: Tensor, monkeypatch) -> tuple[Tensor, Tensor]:
    """Mean and rstd, [C] in fp64."""
    monkeypatch.setattr(tiles, "FEW_SPLITS", 1 << 30)
    outputs = launch.forward(*arguments_of(x, NORM, relu=False))
    return outputs.mean[0].double(), outputs.rstd[0].double()


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_channels_are_exact(layout, dtype, splits, device, monkeypatch):
    values = torch.tensor([0.0, 1.0, -1e-3, 1000.1, 1e30, -7e-39]).repeat(4)
    x = image(values[None, :, None, None].expand(SHAPE), dtype, layout, device)
    mean, var = by_combine_kernel(x)
    assert torch.equal(mean, x[0, :, 0, 0].double())
    assert not var.any()
    mean, rstd = by_second_pass(x, monkeypatch)
    assert torch.equal(mean, x[0, :, 0, 0].double())
    eps = torch.finfo(accumulation_type(x)).eps
    torch.testing.assert_close(rstd, torch.full_like(rstd, NORM.eps**-0.5), rtol=2 * eps, atol=0)


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_outlier_at_any_row_costs_no_digits(layout, dtype, splits, device, monkeypatch):
    """Also in a row of which the pivot is made; each channel has its outlier in another row."""
    torch.manual_seed(0)
    n_rows = SHAPE[0] * SHAPE[2] * SHAPE[3]
    noise = torch.randn(SHAPE, dtype=torch.float64)
    x = image(noise, dtype, layout, device)
    rows_per_split = launch.partial_statistics(x, launch.Shape.of(x)).rows_per_split
    of_pivot = pivot_rows(n_rows, 64).tolist()
    for channel in range(SHAPE[1]):
        first = channel // 4 * rows_per_split % n_rows
        n_own = min(rows_per_split, n_rows - first)
        row = (of_pivot[channel], first, first + (n_own - 1) // 2, first + n_own - 1)[channel % 4]
        x[row // 81, channel, row % 81 // 9, row % 9] = 1e4
    channels = x.double().transpose(0, 1).flatten(1)
    exact_mean, exact_var = (  # fractions, rounded once
        torch.tensor([of(channel) for channel in channels.tolist()], dtype=torch.float64, device=device)
        for of in (statistics.mean, statistics.pvariance)
    )
    rtol = ROUNDINGS * torch.finfo(accumulation_type(x)).eps / 2
    atol = rtol * channels.abs().mean(1).max().item()  # a mean's terms have both signs
    mean, var = by_combine_kernel(x)
    torch.testing.assert_close(mean, exact_mean, rtol=0, atol=atol)
    torch.testing.assert_close(var, exact_var, rtol=rtol, atol=0)
    mean, rstd = by_second_pass(x, monkeypatch)
    torch.testing.assert_close(mean, exact_mean, rtol=0, atol=atol)
    torch.testing.assert_close(rstd, (exact_var + NORM.eps).rsqrt(), rtol=rtol, atol=0)


def test_joined_norms_have_splits_of_their_own(device, monkeypatch):
    """As where a convolution has computed the partial results of x, and a pass those of the residual."""
    torch.manual_seed(0)
    x, residual = (image(torch.randn(SHAPE), torch.float32, "channels_last", device) for _ in range(2))
    expected = launch.forward(*arguments_of(x, NORM, residual, NORM))
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "STATISTICS_PROGRAMS", 3)
        partial = launch.partial_statistics(x, launch.Shape.of(x))
    assert len(partial.partials) < len(launch.partial_statistics(residual, launch.Shape.of(residual)).partials)
    found = launch.forward(*arguments_of(x, NORM, residual, NORM), partial=partial)
    for name in ("mean", "rstd", "residual_mean", "residual_rstd", "y"):
        # Sums of other splits round otherwise, by some roundings of values of order one.
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6, msg=name)


def test_typical_values_cost_at_most_twice_eagers_error(device):
    """So near to the mean is the pivot: at two standard deviations from it five times as much would cancel."""
    torch.manual_seed(0)
    x = image(torch.randn(2, 256, 8, 8), torch.float32, "channels_last", device)
    exact = x.double().var((0, 2, 3), correction=0)
    _, var = by_combine_kernel(x)
    mean, eager = torch.zeros(256, device=device), torch.zeros(256, device=device)
    torch.nn.functional.batch_norm(x, mean, eager, training=True, momentum=1.0)
    errors = [((of.double() - exact) / exact).abs().max().item() for of in (var, eager * (127 / 128))]
    assert errors[0] <= 2 * errors[1] + 2**-23
