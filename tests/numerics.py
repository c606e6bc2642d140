"""Error against fp64 of batch norm + residual + ReLU in training: named cases, three providers, one measurement.

tests/test_numerics.py holds ours to eager's error; tests/numerics_page.py writes the same figures to docs/.

Errors are in units of a channel's scale: the largest sum of the magnitudes of the terms of that result (the equations
of kernels/README.md with absolute values), so that they do not depend on the units of x. Where all terms are zero the
error is absolute. ReLU's gradient jumps at 0: the exact gradients take it as closed where the provider's own y is 0,
else one element within a rounding of zero would count as an error of the whole dy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from fused_op import LAYOUTS, PER_CHANNEL, Operands, channels, eager, ours, results
from torch import Tensor

from resnet_fast.functional import BatchNormArgs
from resnet_fast.ops import reference

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IMAGES = ("y", "dx", "dresidual")
RESULTS = (*IMAGES, "dweight", "dbias", "running_mean", "running_var")

Noise = Callable[[Tensor, torch.dtype], Tensor]


@dataclass(frozen=True)
class Case:
    """x = `make_x`(N(0, 1) of this shape in fp64, dtype), rounded to dtype. `value` is the place on a sweep's axis."""

    name: str
    make_x: Noise
    shape: tuple[int, int, int, int] = (4, 8, 16, 16)
    layout: str = "channels_last"
    sweep: str = "corner"
    value: float = 0.0
    dtypes: tuple[str, ...] = tuple(DTYPES)
    only_x: bool = False  # bias is 0 and the residual as small as x, which they would hide

    def __str__(self) -> str:
        return self.name


class Error(NamedTuple):
    """In units of the scale: the largest over all elements, and the root of the mean square."""

    max: float
    rms: float

    @classmethod
    def of(cls, difference: Tensor) -> "Error":
        return cls(difference.abs().max().item(), difference.square().mean().sqrt().item())


def _mean_over_std(ratio: float) -> Noise:
    """Std is 1/4, so that 1e5 of it is an fp16 number; the sign of the mean alternates between channels."""
    return lambda noise, dtype: (noise + ratio * (-1.0) ** torch.arange(noise.shape[1])[None, :, None, None]) / 4


def _outlier(size: float, *places: tuple[int, int]) -> Noise:
    """At every place: image, pixel."""

    def make_x(noise: Tensor, dtype: torch.dtype) -> Tensor:
        for image, pixel in places:
            noise.flatten(2)[image, :, pixel] = size
        return noise

    return make_x


def _constant(value: float) -> Noise:
    return lambda noise, dtype: torch.full_like(noise, value)


def _share_of_max(share: float) -> Noise:
    return lambda noise, dtype: noise.clamp(-2, 2) / 2 * (share * torch.finfo(dtype).max)


def _denormal(noise: Tensor, dtype: torch.dtype) -> Tensor:
    return noise.clamp(-2, 2) / 2 * (0.99 * torch.finfo(dtype).smallest_normal)


MEANS = tuple(
    Case(f"mean {ratio:g} std", _mean_over_std(ratio), sweep="mean", value=ratio)
    for ratio in (0, 1, 10, 100, 1e3, 1e4, 1e5)
)
ROWS = tuple(
    Case(f"{math.prod(size)} rows", _mean_over_std(0.5), (size[0], 8, *size[1:]), sweep="rows", value=math.prod(size))
    for size in ((2, 1, 1), (1, 4, 4), (2, 8, 8), (4, 16, 16), (8, 32, 32), (64, 32, 32))
) + (
    # Two channels in NCHW fill whole tiles: the cheapest 2^20 rows that the interpreter can run.
    Case("1048576 rows", _mean_over_std(0.5), (1, 2, 1024, 1024), layout="nchw", sweep="rows", value=2**20),
)
WIDE = ("fp32", "bf16")  # the range of fp16 ends at 65504
CORNERS = (
    Case("outlier 1e4", _outlier(1e4, (1, 77))),
    Case("outlier 1e4 in row 0", _outlier(1e4, (0, 0))),
    Case("outliers 1e4 in rows 0 and -1", _outlier(1e4, (0, 0), (-1, -1))),
    Case("30 in pixel 0 of every image", _outlier(30, *((image, 0) for image in range(32))), (32, 8, 8, 8)),
    Case("outlier 1e30", _outlier(1e30, (1, 77)), dtypes=WIDE),
    Case("outlier 1e30 in row 0", _outlier(1e30, (0, 0)), dtypes=WIDE),
    Case("constant 0", _constant(0.0)),
    Case("constant 1", _constant(1.0)),
    Case("constant 1e-3", _constant(1e-3)),
    Case("constant 1000.1", _constant(1000.1)),
    Case("constant 1e30", _constant(1e30), dtypes=WIDE),
    Case("denormals", _denormal, only_x=True),
    Case("max/8", _share_of_max(1 / 8)),
    Case("max", _share_of_max(1.0), dtypes=("fp16",)),
)
CASES = MEANS + ROWS + CORNERS


def make_operands(case: Case, dtype: torch.dtype, device: torch.device) -> Operands:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(case.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    n_channels = case.shape[1]
    weight = torch.rand(n_channels, generator=generator) + 0.5
    bias = torch.zeros(n_channels) if case.only_x else 2 * torch.rand(n_channels, generator=generator) - 1
    weight[::2] *= -1
    x, residual, dy = case.make_x(noise[0], dtype), noise[1], noise[2]
    if case.only_x:
        residual = case.make_x(residual, dtype)
    norm = BatchNormArgs(torch.zeros(n_channels), torch.ones(n_channels), weight, bias, True, 0.1, 1e-5)
    x, residual, dy = (t.to(device, dtype).contiguous(memory_format=LAYOUTS[case.layout]) for t in (x, residual, dy))
    norm = BatchNormArgs(*(v.to(device) if isinstance(v, Tensor) else v for v in norm))
    return Operands(x, residual, [norm, norm], dy)  # the residual's is not used


def compiled(*arguments) -> Tensor:
    torch.compiler.reset()  # else one shape too many runs eagerly, in silence
    return torch.compile(eager, fullgraph=True, dynamic=False)(*arguments)


PROVIDERS = {"ours": ours, "eager": eager, "torch.compile": compiled}


class Exact:
    """The pass in fp64, from the rounded operands."""

    def __init__(self, operands: Operands) -> None:
        exact = operands.to(torch.float64)
        self.x, self.residual, self.dy, self.norm = exact.x, exact.residual, exact.dy, exact.norms[0]
        pivot = self.x[:1, :, :1, :1]  # fp64 has no digits to spare either where a channel is constant 1e30
        shift = (self.x - pivot).mean(PER_CHANNEL, keepdim=True)
        self.centered = self.x - pivot - shift
        self.mean = (pivot + shift).flatten()
        self.var = self.centered.square().mean(PER_CHANNEL)
        self.rstd = (self.var + self.norm.eps).rsqrt()
        self.zero_mean = torch.zeros_like(self.mean)

    def results(self, relu_open: Tensor) -> dict[str, Tensor]:
        norm, n_rows = self.norm, self.x.numel() // self.x.shape[1]
        z = reference.normalize(self.centered, self.zero_mean, self.rstd, norm.weight, norm.bias) + self.residual
        dz = self.dy.where(relu_open, 0)
        dx, dweight, dbias = reference.backward(dz, self.centered, self.zero_mean, self.rstd, norm.weight, True)
        old, new = 1 - norm.momentum, norm.momentum
        return {
            "y": z.relu(),
            "dx": dx,
            "dresidual": dz,
            "dweight": dweight,
            "dbias": dbias,
            "running_mean": old * norm.running_mean + new * self.mean,
            "running_var": old * norm.running_var + new * self.var * (n_rows / (n_rows - 1)),
        }

    def magnitudes(self) -> dict[str, Tensor]:
        """For every result the sum of its terms' magnitudes, with ReLU open everywhere."""
        norm, dz = self.norm, self.dy.abs()
        x_hat = (self.centered * channels(self.rstd)).abs()
        weight = channels(norm.weight.abs())
        dx = dz + dz.mean(PER_CHANNEL, True) + x_hat * (dz * x_hat).mean(PER_CHANNEL, True)
        return {
            "y": weight * x_hat + channels(norm.bias.abs()) + self.residual.abs(),
            "dx": weight * channels(self.rstd) * dx,
            "dresidual": dz,
            "dweight": (dz * x_hat).sum(PER_CHANNEL),
            "dbias": dz.sum(PER_CHANNEL),
            # Statistics are those of x - pivot, a value of x: its terms are of the size of x, and of std.
            "running_mean": norm.momentum * (self.x.abs().mean(PER_CHANNEL) + self.var.sqrt()),
            "running_var": (1 - norm.momentum) * norm.running_var + norm.momentum * self.var,
        }


def scales(magnitudes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The unit of each result's error, by channel."""
    found = {n: t.amax(PER_CHANNEL, True) if n in IMAGES else t for n, t in magnitudes.items()}
    return {name: scale.where(scale > 0, 1) for name, scale in found.items()}


@cache
def errors(case: Case, dtype: torch.dtype, provider: str, device: torch.device) -> dict[str, Error]:
    """The error of every result of `provider`; infinite where a result is not finite and the exact one, rounded, is."""
    operands = make_operands(case, dtype, device)
    found, exact = results(PROVIDERS[provider], operands, "add", True, "triton"), Exact(operands)
    expected, scale = exact.results(relu_open=~(found["y"] <= 0)), scales(exact.magnitudes())

    def difference(name: str) -> Tensor:
        result, rounded = found[name], expected[name].to(found[name].dtype)
        overflow = rounded.isinf() & (result == rounded)
        return (result.double() - expected[name]).masked_fill(overflow, 0).nan_to_num(math.inf, math.inf, -math.inf)

    return {name: Error.of(difference(name) / scale[name]) for name in RESULTS}


@cache
def allowances(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Error]:
    """What tests/budget.py allows beside twice eager's error: a rounding of the result, one in fp32 of its terms."""
    operands = make_operands(case, dtype, device)
    exact = Exact(operands)
    terms = exact.magnitudes()
    expected, scale = exact.results(relu_open=torch.ones_like(operands.x, dtype=torch.bool)), scales(terms)

    def roundings(name: str) -> Error:
        result_type = dtype if name in IMAGES else torch.float32
        of_result = Error.of(torch.finfo(result_type).eps / 2 * expected[name] / scale[name])
        of_terms = Error.of(torch.finfo(torch.float32).eps / 2 * terms[name] / scale[name])
        return Error(of_result.max + of_terms.max, of_result.rms + of_terms.rms)

    return {name: roundings(name) for name in RESULTS}
