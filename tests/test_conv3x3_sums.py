"""Convolutions compute the same statistics and sums as the batch norms around them, and move no extra byte."""

import pytest
import torch
from budget import assert_within_budget
from guard import guarded_memory
from test_conv3x3 import CASES, TYPED, Case, channels_last, cuts, operands, saved_by
from torch import Tensor

from resnet_fast.ops import BatchNormArgs, conv3x3, launch, reference
from resnet_fast.ops.arguments import PartialStatistics, Saved, Settings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]


def fresh_norm(n_channels: int, device: torch.device) -> BatchNormArgs:
    running = [torch.zeros(n_channels, device=device), torch.ones(n_channels, device=device)]
    return BatchNormArgs(*running, training=True, momentum=0.3)


def statistics(y: Tensor, known: PartialStatistics | None) -> dict[str, Tensor]:
    norm, var = fresh_norm(y.shape[1], y.device), y.new_empty(1, y.shape[1], dtype=torch.float64)
    shape = launch.Shape.of(y)
    mean, rstd = launch.combine_statistics(known or launch.partial_statistics(y, shape), norm, shape, var)
    found = {"mean": mean[0], "rstd": rstd[0], "var": var[0].float()}
    return found | {"running_mean": norm.running_mean, "running_var": norm.running_var}


@TYPED
def test_statistics(case, dtype, device):
    """Those of the rounded output, as its own pass computes them, which has the benefit of a pivot."""
    x, weight, _ = operands(case, dtype, device)
    for tiles in cuts(case.in_channels, case.out_channels, with_sums=False, x=x):
        y, known = conv3x3.forward(x, weight, tiles)
        found, own = statistics(y, known), statistics(y, None)
        exact_mean, exact_var = reference.statistics(y.double())
        n_rows = y.numel() // y.shape[1]
        exact = {"mean": exact_mean, "rstd": (exact_var + 1e-5).rsqrt(), "var": exact_var}
        exact |= {"running_mean": 0.3 * exact_mean, "running_var": 0.7 + 0.3 * exact_var * n_rows / (n_rows - 1)}
        # The terms of a mean are the values, those of a variance their squared deviations.
        added = {"mean": y.double().abs().mean((0, 2, 3)), "running_mean": 0.3 * y.double().abs().mean((0, 2, 3))}
        added |= {name: 4 * exact[name].abs() for name in ("var", "rstd", "running_var")}
        for name in found:
            assert_within_budget(name, found[name], own[name], exact[name], added[name])


@pytest.mark.parametrize("scale", (1e-30, 1e25))
def test_statistics_of_tiny_and_huge_values(scale, device):
    """Whose squares vanish or overflow: the rescue in units of 2^100, across tiles of which some need none."""
    x, weight, _ = operands(Case("huge", 3, 16, 16, 8), torch.bfloat16, device)
    x[1:] *= scale
    weight[8:] = 0  # channels that are not touched by it
    for tiles in cuts(16, 16, with_sums=False, x=x):
        y, known = conv3x3.forward(x, weight, tiles._replace(block_m=64, per_program=2))
        found, own = statistics(y, known), statistics(y, None)
        for name in ("mean", "rstd", "var"):  # within some roundings of fp32, relative: nothing cancels
            torch.testing.assert_close(found[name], own[name], rtol=2**-17, atol=0)


def test_a_channel_with_inf_or_nan_is_as_pytorchs(device):
    x, weight, _ = operands(Case("not finite", 3, 16, 16, 8), torch.bfloat16, device)
    weight.zero_()
    weight[0, 0, 1, 1] = weight[1, 1, 1, 1] = weight[2, 2, 1, 1] = weight[3, 3, 1, 1] = 1
    x[0, 0, 0, 0], x[1, 1, 0, 0] = float("inf"), float("nan")
    x[0, 2, 0, 0], x[2, 2, 0, 0] = float("inf"), -float("inf")
    assert_as_pytorch(x, weight)


def test_a_channel_that_overflows_is_as_pytorchs(device):
    """One infinity among finite values, in the rows of the first program or of the last."""
    x, weight, _ = operands(Case("overflow", 3, 16, 16, 8), torch.float16, device)
    weight.zero_()
    weight[0, 0, 1, 1] = weight[1, 1, 1, 1] = weight[2, 2, 1, 1] = 2
    x[0, 0, 0, 0], x[0, 1, 0, 0], x[2, 2, 7, 7] = 6e4, -6e4, 6e4
    means = assert_as_pytorch(x, weight)
    assert means[:3].tolist() == [float("inf"), -float("inf"), float("inf")]


def assert_as_pytorch(x: Tensor, weight: Tensor) -> Tensor:
    for tiles in cuts(16, 16, with_sums=False, x=x):
        y, known = conv3x3.forward(x, weight, tiles._replace(block_m=64, per_program=2))
        found = statistics(y, known)
        mean, var = reference.statistics(y.float())
        torch.testing.assert_close(found["mean"], mean, equal_nan=True)
        torch.testing.assert_close(found["var"], var, equal_nan=True, rtol=2**-17, atol=0)
    return found["mean"]


def always_open(saved: Saved) -> Saved:
    """Of a batch norm whose ReLU is open everywhere, so that dz is the convolution's gradient itself."""
    bias = torch.full_like(saved.mean[0], 1e9)
    residual = ("residual", "residual_weight", "residual_bias", "residual_mean", "residual_rstd")
    return saved._replace(relu_mask=None, bias=bias, **dict.fromkeys(residual))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("fork", (False, True), ids=("one consumer", "two consumers"))
@pytest.mark.parametrize("join", ("none", "add", "bn"))
def test_sums(join, fork, dtype, device):
    """dz to the bit as the batch norm's own pass has it from the same gradient, and its sums within the budget."""
    for case in (CASES[3],):
        x, weight, dy = operands(case, dtype, device)
        y, saved = saved_by(x, join)
        dx_alias = channels_last(torch.randn_like(x)) if fork else None
        for tiles in cuts(case.out_channels, case.in_channels, with_sums=True, x=x):
            dx, _, _ = conv3x3.data_gradient(dy, weight, tiles, always_open(saved), None)
            assert dx.count_nonzero() > 0.99 * dx.numel()
            dz, sums, _ = conv3x3.data_gradient(dy, weight, tiles, saved, dx_alias)
            settings = Settings(join, True, True, join == "bn")
            expected, partials, n_splits = launch.partial_sums(dx, dx_alias, saved, settings, launch.Shape.of(dx))
            own, _ = launch.combine_gradients(partials, 1, n_splits, saved)
            if expected is None:  # where that pass writes none: without bits and without a fork
                expected = dx.masked_fill(y <= 0, 0)
            assert torch.equal(dz, expected)
            assert sums.shape == own.shape
            terms = [torch.ones_like(dz.double()), xhat(saved.x, saved.mean, saved.rstd)]
            if join == "bn":
                terms.append(xhat(saved.residual, saved.residual_mean, saved.residual_rstd))
            for name, found, of_pass, term in zip(("dz", "dz·x̂", "dz·r̂"), sums, own, terms, strict=False):
                product = dz.double() * term
                exact, added = (t.sum((0, 2, 3))[None] for t in (product, product.abs()))
                # A term is rounded three times: x - mean, times rstd, times dz.
                assert_within_budget(f"sum of {name}", found, of_pass, exact, 3 * added)


def xhat(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return reference.normalize(x.double(), mean[0].double(), rstd[0].double(), None, None)


@pytest.mark.parametrize("case", CASES[2:], ids=str)
def test_nothing_is_written_outside_of_the_results_and_nothing_inside_is_left_out(case, device):
    x, weight, dy = operands(case, torch.bfloat16, device)
    (_, saved), dx_alias = saved_by(x, "bn"), channels_last(torch.randn_like(x))
    tiles = cuts(case.in_channels, case.out_channels, with_sums=False, x=x)[1]
    of_gradient = cuts(case.out_channels, case.in_channels, with_sums=True, x=x)[1]

    def run() -> list[Tensor]:
        y, (partials, _) = conv3x3.forward(x, weight, tiles)
        return [y, partials, *conv3x3.data_gradient(dy, weight, of_gradient, saved, dx_alias)[:2]]

    with guarded_memory() as kernels:
        found = run()
    expected = {"conv3x3_kernel", "conv3x3_data_gradient_kernel"}
    assert {name for name in kernels if name.startswith("conv3x3")} == expected
    assert all(map(torch.equal, found, run()))
