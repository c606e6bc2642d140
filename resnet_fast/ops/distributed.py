"""Batch norm over the batches of several processes, on the Triton kernels or, if ATen is chosen, in plain PyTorch.

Forward: mean and variance of this process's rows, one all_gather, Chan's formula (S2) in fp64, then the normalization.
Backward: the sums over this process's rows (B2), one all_reduce, then dx (B4). Batches may differ in size between
processes, and may be empty.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference
from .arguments import (
    NO_STATISTICS,
    BatchNormArgs,
    Gradients,
    Inputs,
    Outputs,
    Saved,
    Settings,
    Statistics,
    accumulation_type,
)
from .backend import choose_backend, device_guard, launch
from .layout import dense


class Group(NamedTuple):
    """The processes that normalize their batches together, and the layer's name, for error messages."""

    processes: dist.ProcessGroup
    layer: str

    def gather(self, own: Tensor) -> Tensor:
        """Return every process's vector, [processes, n]."""
        gathered = own.new_empty(dist.get_world_size(self.processes), len(own))
        self._wait_for_all(dist.all_gather, list(gathered), own)
        return gathered

    def add_up(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over all processes."""
        self._wait_for_all(dist.all_reduce, tensor)

    def _wait_for_all(self, collective: Callable, *tensors) -> None:
        try:
            collective(*tensors, group=self.processes)
        except RuntimeError as error:
            raise type(error)(
                f"{self.layer} needs every process of its group, and one is gone, late or out of batches (under "
                f"model.join() or Join, throw_on_early_termination=True ends them together): {error}"
            ) from error


def forward(inputs: Inputs, settings: Settings, group: Group) -> tuple[Outputs, Tensor]:
    """Compute relu(bn(x) + residual) with the statistics of all processes' batches; also return their number of rows.

    On ATen `relu_mask` is a bool tensor like x, and present with every ReLU.
    """
    x = inputs.x
    on_triton = choose_backend(x) == "triton"
    norm, residual_norm = inputs.norms(settings)
    tensors: list[Any] = [x, inputs.residual] if settings.join == "bn" else [x]
    with device_guard(x):
        moments, total_rows = _gather(x, [_moments(tensor, on_triton) for tensor in tensors], group)
        statistics, residual_statistics = _statistics(x, norm, moments[0], total_rows), NO_STATISTICS
        if settings.join == "bn":
            residual_statistics = _statistics(x, residual_norm, moments[1], total_rows)
        arguments = (inputs, settings, statistics, residual_statistics)
        outputs = launch.normalize(*arguments, launch.Shape.of(x)) if on_triton else _normalize(*arguments)
        return outputs, total_rows


def backward(
    dy: Tensor, dy_alias: Tensor | None, saved: Saved, settings: Settings, total_rows: Tensor, group: Group
) -> Gradients:
    """Compute dx as for the joint batch; the parameters' gradients are sums over this process's rows alone."""
    dy = dense(dy, like=saved.x)
    dy_alias = None if dy_alias is None else dense(dy_alias, like=saved.x)
    with device_guard(saved.x):
        if choose_backend(saved.x) == "aten":
            return _backward(dy, dy_alias, saved, settings, total_rows, group)
        shape = launch.Shape.of(saved.x)
        dz, partials, n_splits = launch.partial_sums(dy, dy_alias, saved, settings, shape)
        sums, gradients = launch.combine_gradients(partials, 1, n_splits, saved)
        group.add_up(sums)
        sums *= shape.n_rows / total_rows  # the kernel divides by this process's rows
        return launch.input_gradients(dy, dz, saved, settings, shape, gradients, sums)


def _moments(x: Tensor, on_triton: bool) -> Tensor:
    """Return mean and biased variance of x's rows, [2, C], 0 without rows; in fp64 squares of huge values fit."""
    moments = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
    if on_triton:
        moments[0] = launch.moments(x, var=moments[1])
    elif x.numel() > 0:
        moments[0], moments[1] = reference.statistics(x.to(moments.dtype))
    return moments


def _gather(x: Tensor, own: list[Tensor], group: Group) -> tuple[Tensor, Tensor]:
    """Return mean and variance of all processes' rows, [tensors, 2, C], and their number, by one collective in fp64."""
    count = torch.full((1,), len(x) * x.shape[2:].numel(), dtype=torch.float64, device=x.device)
    packed = torch.cat([count, *(moments.flatten() for moments in own)])
    gathered = group.gather(packed)
    counts = gathered[:, 0, None, None]
    means, variances = gathered[:, 1:].unflatten(1, (len(own), 2, -1)).unbind(2)
    total_rows = counts.sum()
    mean = (counts * means).sum(0) / total_rows
    var = (counts * (variances + (means - mean).square())).sum(0) / total_rows
    return torch.stack([mean, var], 1), total_rows


def _statistics(x: Tensor, norm: BatchNormArgs, moments: Tensor, total_rows: Tensor) -> Statistics:
    """Return mean and rstd of the pass; update the running statistics, or use them if they are frozen."""
    mean, var = moments
    running_mean, running_var = norm.running_mean, norm.running_var
    if running_mean is not None and running_var is not None:
        if norm.training:
            unbiased = var * (total_rows / (total_rows - 1))
            for running, new in ((running_mean, mean), (running_var, unbiased)):
                # Without rows there is no mean, and with one row no variance: leave the running statistics unchanged.
                running.lerp_(new.to(running.dtype).where(total_rows > 1, running), norm.momentum)
        else:
            mean, var = running_mean.double(), running_var.double()
    acc_type = accumulation_type(x)
    return Statistics(mean.to(acc_type), (var + norm.eps).rsqrt().to(acc_type))


def _normalize(inputs: Inputs, settings: Settings, statistics: Statistics, residual_statistics: Statistics) -> Outputs:
    """Compute `launch.normalize` in plain PyTorch."""
    x, residual, weight, bias, residual_weight, residual_bias = inputs[:6]
    mean, rstd, residual_mean, residual_rstd = *statistics[:2], *residual_statistics[:2]
    z = reference.normalize(x.to(mean.dtype), mean, rstd, weight, bias)
    if residual is not None:
        residual = residual.to(z.dtype)
        if settings.join == "bn":
            residual = reference.normalize(residual, residual_mean, residual_rstd, residual_weight, residual_bias)
        z = z + residual
    y = z.to(x.dtype)
    relu_mask = y <= 0 if settings.relu else None
    return Outputs(y.relu() if settings.relu else y, relu_mask, mean, rstd, residual_mean, residual_rstd)


def _backward(
    dy: Tensor, dy_alias: Tensor | None, saved: Saved, settings: Settings, total_rows: Tensor, group: Group
) -> Gradients:
    """Compute `backward` in plain PyTorch, with the kernels' collective: other processes may run on the kernels."""
    dresidual = dy if dy_alias is None else dy + dy_alias
    if saved.relu_mask is not None:
        dresidual = dresidual.masked_fill(saved.relu_mask, 0)
    acc_type = saved.mean.dtype
    dz = dresidual.to(acc_type)
    normed = [(saved.x.to(acc_type), saved.mean, saved.rstd)]
    if saved.residual is not None:
        normed.append((saved.residual.to(acc_type), saved.residual_mean, saved.residual_rstd))  # type: ignore[arg-type]
    sums = [reference.gradient_sums(dz, *one) for one in normed]
    dbias, dweights = sums[0][0], [dweight for _, dweight in sums]
    joint = torch.stack([dbias, *dweights])
    group.add_up(joint)
    mean_dz, *means = (joint / total_rows).to(acc_type)
    weights, are_training = (saved.weight, saved.residual_weight), (settings.training, settings.residual_training)
    per_norm = zip(normed, weights, means, are_training, strict=False)
    dx, *dresiduals = (
        reference.input_gradient(dz, *one, weight, mean_dz, mean, training).to(saved.x.dtype)
        for one, weight, mean, training in per_norm
    )
    if settings.join == "bn":
        (dresidual,) = dresiduals

    def like(parameter: Tensor | None, gradient: Tensor) -> Tensor | None:
        return None if parameter is None else gradient.to(parameter.dtype)

    return Gradients(
        dx,
        None if settings.join == "none" else dresidual,
        like(saved.weight, dweights[0]),
        like(saved.bias, dbias),
        like(saved.residual_weight, dweights[-1]),
        like(saved.residual_bias, dbias),
    )


def differentiable_statistics(x: Tensor, total_rows: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of all processes' rows, with derivatives of any order."""
    mean = _AllReduce.apply(x.sum(reference.PER_CHANNEL), group) / total_rows.to(x.dtype)
    centered = x - mean[None, :, None, None]
    return mean, _AllReduce.apply(centered.square().sum(reference.PER_CHANNEL), group) / total_rows.to(x.dtype)


class _AllReduce(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        tensor = tensor.clone()
        group.add_up(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return _AllReduce.apply(gradient, ctx.group), None
