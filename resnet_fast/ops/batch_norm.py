"""The two operators on the Triton kernels: schemas, implementations and fakes.

`torch.ops.resnet_fast.batch_norm_add_relu` and its `_backward` take flat arguments, because a schema knows no tuples,
and return empty tensors for what there is not. `ghost_batch_size` is the number of images that share batch statistics,
0 for all. Users call resnet_fast.functional, the only caller of these.
"""

import torch
from torch import Tensor

from . import choices
from .arguments import BatchNormArgs, Gradients, Join, Outputs, PartialStatistics, Saved, accumulation_type, join_of
from .backend import choose_backend, device_guard, launch, single_read
from .implementations import DTYPES, REVERSED, SINGLE_READ, TWO_PASSES, Operation, Problem
from .layout import dense

_NORM = "Tensor({a}!)? {p}running_mean, Tensor({b}!)? {p}running_var, Tensor? {p}weight, Tensor? {p}bias, \
bool {p}training, float {p}momentum, float {p}eps"

_LIBRARY = torch.library.Library("resnet_fast", "DEF")
_LIBRARY.define(
    f"batch_norm_add_relu(Tensor x, {_NORM.format(p='', a='a', b='b')}, "
    f"Tensor? residual, {_NORM.format(p='residual_', a='c', b='d')}, str join, bool relu, int ghost_batch_size)"
    " -> (Tensor y, Tensor relu_mask, Tensor mean, Tensor rstd, Tensor residual_mean, Tensor residual_rstd)",
)
_LIBRARY.define(
    "batch_norm_add_relu_backward(Tensor dy, Tensor? dy_alias, Tensor x, Tensor? relu_mask, Tensor mean, Tensor rstd, "
    "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? residual_mean, Tensor? residual_rstd, "
    "Tensor? residual_weight, Tensor? residual_bias, str join, bool relu, bool training, bool residual_training, "
    "int ghost_batch_size)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual, Tensor dresidual_weight, Tensor dresidual_bias)",
)

# Autograd has no business with the operators: the gradient is the autograd.Function's in functional.py.
for _name in ("batch_norm_add_relu", "batch_norm_add_relu_backward"):
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")

# The overloads themselves: looking them up costs more than calling them.
forward_op = torch.ops.resnet_fast.batch_norm_add_relu.default
backward_op = torch.ops.resnet_fast.batch_norm_add_relu_backward.default


def _unpack(arguments: tuple) -> tuple[BatchNormArgs, Tensor | None, BatchNormArgs | None, bool, int]:
    """The forward operator's arguments behind x, as `launch.forward` takes them."""
    n = len(BatchNormArgs._fields)
    *residual_norm, join, relu, ghost_batch_size = arguments[n + 1 :]
    norm, residual = BatchNormArgs(*arguments[:n]), arguments[n]
    return norm, residual, BatchNormArgs(*residual_norm) if join == "bn" else None, relu, ghost_batch_size


def _present(tensors: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors: an empty one stands for None."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def _chosen(
    operation: Operation, x: Tensor, join: Join, fork: bool, batch_statistics: bool, ghost_batch_size: int
) -> str:
    """The implementation that runs: what the table names, unless it cannot run here."""
    n_images, n_channels, height, width = x.shape
    if choices.is_empty(x.device) or x.dtype not in DTYPES or height != width or not batch_statistics:
        return TWO_PASSES
    if not x.is_contiguous(memory_format=torch.channels_last):
        return TWO_PASSES
    problem = Problem(operation, DTYPES[x.dtype], n_images, n_channels, n_channels, width, join, fork)
    chosen = choices.choose(problem, x.device).implementation
    if chosen == SINGLE_READ and not single_read.fits(x, operation, join, ghost_batch_size):
        return TWO_PASSES
    return chosen


def forward(
    x: Tensor,
    norm: BatchNormArgs,
    residual: Tensor | None,
    residual_norm: BatchNormArgs | None,
    relu: bool,
    ghost_batch_size: int = 0,
    statistics: PartialStatistics | None = None,
) -> Outputs:
    """relu(bn(x) + residual) by the implementation that is chosen; `statistics`: of x, if they need no pass."""
    choose_backend(x, "triton")  # or raise, with the reason
    x = dense(x)
    residual = None if residual is None else dense(residual, like=x)
    batch_statistics = norm.training and (residual_norm is None or residual_norm.training)
    join = join_of(residual, residual_norm)
    with device_guard(x):
        chosen = TWO_PASSES
        if statistics is None:
            chosen = _chosen("batch norm", x, join, False, batch_statistics, ghost_batch_size)
        if chosen == SINGLE_READ:
            return single_read.forward(x, norm, residual, residual_norm, relu)
        arguments = (x, norm, residual, residual_norm, relu, ghost_batch_size)
        return launch.forward(*arguments, reverse=chosen == REVERSED, partial=statistics)


@torch.library.impl("resnet_fast::batch_norm_add_relu", "default")
def _forward(x: Tensor, *arguments) -> tuple[Tensor, ...]:
    return _present(forward(x, *_unpack(arguments)), like=x)


@torch.library.register_fake("resnet_fast::batch_norm_add_relu")
def _forward_fake(x: Tensor, *arguments) -> tuple[Tensor, ...]:
    _, residual, residual_norm, relu, ghost_batch_size = _unpack(arguments)
    x = dense(x)
    shape = launch.Shape.of(x, ghost_batch_size)
    relu_mask = None
    if relu and residual is not None:
        relu_mask = x.new_empty(shape.relu_mask, dtype=torch.uint8)
    mean, rstd, residual_mean, residual_rstd = (
        x.new_empty(shape.n_groups, shape.n_channels, dtype=accumulation_type(x)) for _ in range(4)
    )
    if residual_norm is None:
        residual_mean = residual_rstd = None
    return _present(Outputs(torch.empty_like(x), relu_mask, mean, rstd, residual_mean, residual_rstd), like=x)


def backward(
    dy: Tensor,
    dy_alias: Tensor | None,
    saved: Saved,
    join: Join,
    relu: bool,
    training: bool,
    residual_training: bool,
    ghost_batch_size: int = 0,
) -> Gradients:
    """Its gradients by the implementation that is chosen."""
    choose_backend(saved.x, "triton")  # or raise, with the reason
    x = dense(saved.x)
    residual = None if saved.residual is None else dense(saved.residual, like=x)
    saved = saved._replace(x=x, residual=residual)
    dy = dense(dy, like=x)
    dy_alias = None if dy_alias is None else dense(dy_alias, like=x)
    batch_statistics = training and (join != "bn" or residual_training)
    with device_guard(x):
        fork = dy_alias is not None
        chosen = _chosen("batch norm backward", x, join, fork, batch_statistics, ghost_batch_size)
        if chosen == SINGLE_READ:
            return single_read.backward(dy, dy_alias, saved, join, relu)
        settings = (join, relu, training, residual_training, ghost_batch_size)
        return launch.backward(dy, dy_alias, saved, *settings, reverse=chosen == REVERSED)


@torch.library.impl("resnet_fast::batch_norm_add_relu_backward", "default")
def _backward(dy: Tensor, dy_alias: Tensor | None, x: Tensor, *arguments) -> tuple[Tensor, ...]:
    n = len(Saved._fields) - 1
    return _present(backward(dy, dy_alias, Saved(x, *arguments[:n]), *arguments[n:]), like=x)


def backward_with_sums(dz: Tensor, sums: Tensor, saved: Saved, join: Join, residual_training: bool) -> Gradients:
    """The backward operator where what has computed dz has computed the sums, [2 or 3, 1, C], too."""
    with device_guard(dz):
        settings = (join, False, True, residual_training)
        dx, dresidual = launch.input_gradients(dz, dz, sums, saved, *settings, launch.Shape.of(dz))
    dbias, dweight, dresidual_weight = sums[0, 0], sums[1, 0], sums[-1, 0]

    def like(parameter: Tensor | None, gradient: Tensor, copy: bool = False) -> Tensor | None:
        return None if parameter is None else gradient.to(parameter.dtype, copy=copy)

    return Gradients(
        dx,
        like(saved.weight, dweight),
        like(saved.bias, dbias),
        dresidual,
        like(saved.residual_weight, dresidual_weight),
        like(saved.residual_bias, dbias, copy=True),  # which may not share memory with the other
    )


def recompute_y(saved: Saved, ghost_batch_size: int) -> Tensor:
    """The forward's bn(x) before ReLU, of a pass without a residual, rounded as there."""
    norm = BatchNormArgs(None, None, saved.weight, saved.bias)
    with device_guard(saved.x):
        statistics, shape = launch.Statistics(saved.mean, saved.rstd), launch.Shape.of(saved.x, ghost_batch_size)
        return launch.normalize(saved.x, norm, statistics, None, None, None, False, shape).y


@torch.library.register_fake("resnet_fast::batch_norm_add_relu_backward")
def _backward_fake(dy: Tensor, dy_alias: Tensor | None, x: Tensor, *arguments) -> tuple[Tensor, ...]:
    *saved, join, relu, _, _, _ = arguments
    saved = Saved(dense(x), *saved)
    has_dresidual = join == "bn" or (join == "add" and (relu or dy_alias is not None))
    gradients = Gradients(
        dx=saved.x,
        dweight=saved.weight,
        dbias=saved.bias,
        dresidual=saved.x if has_dresidual else None,
        dresidual_weight=saved.residual_weight,
        dresidual_bias=saved.residual_bias,
    )
    return _present(tuple(None if like is None else torch.empty_like(like) for like in gradients), like=x)
