"""The two operators on the Triton kernels: schemas, implementations and fakes.

`torch.ops.resnet_fast.batch_norm_add_relu` and its `_backward` have flat arguments, because schemas have no named
tuples, and return an empty tensor for each absent result. `ghost_batch_size` is the number of images that share batch
statistics, 0 for all. Only resnet_fast.functional, the public interface, calls these operators.
"""

from typing import Any

import torch
from torch import Tensor

from . import choices
from .arguments import (
    NO_STATISTICS,
    Gradients,
    Inputs,
    Outputs,
    PartialStatistics,
    Saved,
    Settings,
    Statistics,
    accumulation_type,
)
from .backend import choose_backend, device_guard, launch, single_read
from .implementations import DTYPES, REVERSED, SINGLE_READ, TWO_PASSES, Operation, Problem
from .layout import dense

_SETTINGS = (
    "str join, bool relu, bool training, bool residual_training, int ghost_batch_size, float eps, float residual_eps"
)
_LIBRARY = torch.library.Library("resnet_fast", "DEF")
_LIBRARY.define(
    "batch_norm_add_relu(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? residual_weight, "
    "Tensor? residual_bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, "
    f"Tensor(c!)? residual_running_mean, Tensor(d!)? residual_running_var, float residual_momentum, {_SETTINGS})"
    " -> (Tensor y, Tensor relu_mask, Tensor mean, Tensor rstd, Tensor residual_mean, Tensor residual_rstd)",
)
_LIBRARY.define(
    "batch_norm_add_relu_backward(Tensor dy, Tensor? dy_alias, Tensor x, Tensor? residual, Tensor? weight, "
    "Tensor? bias, Tensor? residual_weight, Tensor? residual_bias, Tensor? relu_mask, Tensor mean, Tensor rstd, "
    f"Tensor? residual_mean, Tensor? residual_rstd, {_SETTINGS})"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dresidual_weight, Tensor dresidual_bias)",
)

# Autograd skips the operators: the autograd.Function in functional.py computes the gradient.
for _name in ("batch_norm_add_relu", "batch_norm_add_relu_backward"):
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")

# The overloads, looked up once: the lookup costs more than the call.
forward_op = torch.ops.resnet_fast.batch_norm_add_relu.default
backward_op = torch.ops.resnet_fast.batch_norm_add_relu_backward.default


def _unpack(kind: Any, arguments: tuple) -> tuple[Any, Settings]:
    """Split an operator's flat arguments into `Inputs` or `Saved` (`kind`), and the settings."""
    n = len(kind._fields)
    return kind(*arguments[:n]), Settings(*arguments[n:])


def _present(tensors: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Replace None by an empty tensor, because an operator can only return tensors."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def _choose(operation: Operation, x: Tensor, settings: Settings, fork: bool = False) -> str:
    """Return the implementation that the table names, or `TWO_PASSES` if there is none or it cannot run here."""
    n_images, n_channels, height, width = x.shape
    if choices.is_empty(x.device) or x.dtype not in DTYPES or height != width:
        return TWO_PASSES
    if not settings.training or (settings.join == "bn" and not settings.residual_training):
        return TWO_PASSES
    if not x.is_contiguous(memory_format=torch.channels_last):
        return TWO_PASSES
    problem = Problem(operation, DTYPES[x.dtype], n_images, n_channels, n_channels, width, settings.join, fork)
    chosen = choices.choose(problem, x.device).implementation
    if chosen == SINGLE_READ and not single_read.fits(x, operation, settings.join, settings.ghost_batch_size):
        return TWO_PASSES
    return chosen


def forward(inputs: Inputs, settings: Settings, statistics: PartialStatistics | None = None) -> Outputs:
    """Compute relu(bn(x) + residual) by the chosen implementation; `statistics` of x, if given, save a pass."""
    choose_backend(inputs.x, "triton")  # raises if Triton cannot run
    x = dense(inputs.x)
    inputs = inputs._replace(x=x, residual=None if inputs.residual is None else dense(inputs.residual, like=x))
    with device_guard(x):
        chosen = TWO_PASSES if statistics is not None else _choose("batch norm", x, settings)
        if chosen == SINGLE_READ:
            return single_read.forward(inputs, settings)
        return launch.forward(inputs, settings, reverse=chosen == REVERSED, partial=statistics)


@torch.library.impl("resnet_fast::batch_norm_add_relu", "default")
def _forward(*arguments) -> tuple[Tensor, ...]:
    return _present(forward(*_unpack(Inputs, arguments)), like=arguments[0])


@torch.library.register_fake("resnet_fast::batch_norm_add_relu")
def _forward_fake(*arguments) -> tuple[Tensor, ...]:
    inputs, settings = _unpack(Inputs, arguments)
    x = dense(inputs.x)
    shape = launch.Shape.of(x, settings.ghost_batch_size)
    relu_mask = None
    if settings.relu and settings.join != "none":
        relu_mask = x.new_empty(shape.relu_mask, dtype=torch.uint8)
    mean, rstd, residual_mean, residual_rstd = (
        x.new_empty(shape.n_groups, shape.n_channels, dtype=accumulation_type(x)) for _ in range(4)
    )
    if settings.join != "bn":
        residual_mean = residual_rstd = None
    return _present(Outputs(torch.empty_like(x), relu_mask, mean, rstd, residual_mean, residual_rstd), like=x)


def backward(dy: Tensor, dy_alias: Tensor | None, saved: Saved, settings: Settings) -> Gradients:
    """Compute the gradients of `forward` by the chosen implementation."""
    choose_backend(saved.x, "triton")  # raises if Triton cannot run
    x = dense(saved.x)
    dy_alias, residual = (t if t is None else dense(t, like=x) for t in (dy_alias, saved.residual))
    dy, saved = dense(dy, like=x), saved._replace(x=x, residual=residual)
    with device_guard(x):
        chosen = _choose("batch norm backward", x, settings, fork=dy_alias is not None)
        if chosen == SINGLE_READ:
            return single_read.backward(dy, dy_alias, saved, settings)
        return launch.backward(dy, dy_alias, saved, settings, reverse=chosen == REVERSED)


@torch.library.impl("resnet_fast::batch_norm_add_relu_backward", "default")
def _backward(dy: Tensor, dy_alias: Tensor | None, *arguments) -> tuple[Tensor, ...]:
    return _present(backward(dy, dy_alias, *_unpack(Saved, arguments)), like=dy)


def recompute_y(saved: Saved, settings: Settings) -> Tensor:
    """Recompute bn(x) of a pass without a residual: before ReLU, rounded as in the forward."""
    inputs = Inputs(saved.x, None, saved.weight, saved.bias, None, None, None, None, 0.0, None, None, 0.0)
    statistics, shape = Statistics(saved.mean, saved.rstd), launch.Shape.of(saved.x, settings.ghost_batch_size)
    with device_guard(saved.x):
        return launch.normalize(inputs, settings._replace(relu=False), statistics, NO_STATISTICS, shape).y


@torch.library.register_fake("resnet_fast::batch_norm_add_relu_backward")
def _backward_fake(dy: Tensor, dy_alias: Tensor | None, *arguments) -> tuple[Tensor, ...]:
    saved, settings = _unpack(Saved, arguments)
    x, _, *vectors = saved[:6]
    x = dense(x)
    join = settings.join
    has_dresidual = join == "bn" or (join == "add" and (settings.relu or dy_alias is not None))
    like = (x, x if has_dresidual else None, *vectors)
    return _present(tuple(None if one is None else torch.empty_like(one) for one in like), like=x)
