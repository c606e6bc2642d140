"""Random inputs of a problem, in more sets than a cache holds, and the exact results of the first set."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.ops import BatchNormArgs, reference
from resnet_fast.ops.arguments import Saved
from resnet_fast.ops.implementations import DTYPES, Problem
from resnet_fast.tuning.timing import rotation

EPS, MOMENTUM = 1e-5, 0.1
TYPES = {name: dtype for dtype, name in DTYPES.items()}


class Inputs(NamedTuple):
    """One set of the tensors that a problem's operations read, channels_last. A convolution's x is its batch norm's y.

    Args:
        x: [N, C_in, W, W], of the batch norm or of the convolution.
        norm, residual, residual_norm: arguments of the batch norm over C_in channels, in training, and of its join.
        weight: [C_out, C_in, 3, 3] of the convolution, in the type of x.
        dy: [N, C_out, W, W], the gradient of the output.
        alias: [N, C_in, W, W], the gradient from the other consumer after a fork.
    """

    x: Tensor
    norm: BatchNormArgs
    residual: Tensor | None
    residual_norm: BatchNormArgs | None
    weight: Tensor
    dy: Tensor
    alias: Tensor | None


def make_sets(problem: Problem, device: torch.device) -> list[Inputs]:
    """Return the sets of inputs that are used in rotation; they are the same in each run."""
    generator = torch.Generator(device).manual_seed(0)
    first = _make(problem, device, generator)
    size = sum(tensor.nbytes for tensor in first if isinstance(tensor, Tensor))
    return [first, *(_make(problem, device, generator) for _ in range(rotation(size, device) - 1))]


def exact_batch_norm(inputs: Inputs) -> dict[str, Tensor]:
    residual = None
    if inputs.residual is not None:
        residual, theirs = inputs.residual.double(), inputs.residual_norm
        if theirs is not None:
            residual = reference.forward(residual, weight=theirs.weight, bias=theirs.bias, residual=None, relu=False)
    y = reference.forward(inputs.x.double(), weight=inputs.norm.weight, bias=inputs.norm.bias, residual=residual)
    return {"y": y}


def exact_batch_norm_backward(
    inputs: Inputs, saved: Saved, y: Tensor, dy: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the gradients for dy, [N, C_in, W, W], and the alias; for sums, also the magnitudes of their terms.

    ReLU's gradient counts as 0 where `y`, the output that belongs to `saved`, is 0.
    """
    dz = dy.double() if inputs.alias is None else dy.double() + inputs.alias.double()
    dz = dz.masked_fill(y <= 0, 0)
    exact, terms = {"dz": dz} if inputs.residual is not None and inputs.residual_norm is None else {}, {}
    norms = [("", saved.x, saved.mean, saved.rstd, saved.weight)]
    if saved.residual is not None:
        assert saved.residual_mean is not None and saved.residual_rstd is not None
        norms.append(("residual_", saved.residual, saved.residual_mean, saved.residual_rstd, saved.residual_weight))
    for prefix, x, mean, rstd, weight in norms:
        x, mean, rstd = x.double(), mean[0].double(), rstd[0].double()
        names = [f"d{prefix}{name}" for name in ("x", "weight", "bias")]
        exact |= zip(names, reference.backward(dz, x, mean, rstd, weight, training=True), strict=True)
        magnitudes = reference.gradient_sums(dz.abs(), (x - mean[None, :, None, None]).abs(), 0 * mean, rstd)
        terms |= zip(reversed(names), (value.max().item() for value in magnitudes), strict=False)
    return exact, terms


def exact_convolution(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return y and its mean, computed in NCHW, because cuDNN has few fp64 convolutions in channels_last."""
    y = F.conv2d(_exact(inputs.x), _exact(inputs.weight), padding=1)
    return {"y": y, "mean": y.mean(reference.PER_CHANNEL)}, {"mean": y.abs().mean(reference.PER_CHANNEL).max().item()}


def exact_data_gradient(inputs: Inputs) -> Tensor:
    return F.conv_transpose2d(_exact(inputs.dy), _exact(inputs.weight), padding=1)


def _make(problem: Problem, device: torch.device, generator: torch.Generator) -> Inputs:
    n_images, n_in, n_out, width = problem.n_images, problem.in_channels, problem.out_channels, problem.width
    dtype = TYPES[problem.dtype]

    def image(n_channels: int) -> Tensor:
        values = torch.empty(n_images, n_channels, width, width, dtype=dtype, device=device)
        return values.contiguous(memory_format=torch.channels_last).normal_(generator=generator)

    def norm() -> BatchNormArgs:
        mean, var, weight, bias = (
            torch.rand(n_in, device=device, generator=generator) + shift for shift in (-0.5, 0.5, 0.5, -0.5)
        )
        return BatchNormArgs(mean, var, weight, bias, training=True, momentum=MOMENTUM, eps=EPS)

    kernel = torch.randn(n_out, n_in, 3, 3, device=device, generator=generator) * (2 / (9 * n_in)) ** 0.5
    return Inputs(
        x=image(n_in),
        norm=norm(),
        residual=None if problem.join == "none" else image(n_in),
        residual_norm=norm() if problem.join == "bn" else None,
        weight=kernel.to(dtype).contiguous(memory_format=torch.channels_last),
        dy=image(n_out),
        alias=image(n_in) if problem.fork else None,
    )


def _exact(x: Tensor) -> Tensor:
    return x.double().contiguous()
