"""Fused batch norm + residual + ReLU as one differentiable function."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .common.checks import check_type
from .ops import Backend, BatchNormArgs, aten, batch_norm, choices, choose_backend, distributed, reference
from .ops.arguments import NO_NORM, Inputs, Saved, Settings, arguments_of
from .ops.backend import is_plain, unwrap_if_dead
from .ops.backend import plan as launch_plan
from .ops.checks import check_arguments
from .ops.layout import as_image, dense

__all__ = ["BatchNormArgs", "batch_norm_add_relu"]


def batch_norm_add_relu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    residual_norm: BatchNormArgs | None = None,
    relu: bool = True,
    fork: bool = False,
    backend: Backend | None = None,
    ghost_batch_size: int | None = None,
) -> Any:
    """Batch norm, the residual added, ReLU, as one operation; the first eight arguments are those of F.batch_norm.

        y = max(0, bn(x) + r),   bn(x) = (x - mean) / sqrt(var + eps) * weight + bias

    where r is nothing, `residual`, or bn(residual) with the statistics and parameters of `residual_norm`.

    Numerics: fp32 arithmetic (fp64 for fp64 x) and one rounding, of y. Batch variances are merged by Chan's formula,
    never as E[x²] - E[x]²; normalization uses the biased variance, running_var receives the unbiased one. Two runs give
    the same bits. On ATen it is eager PyTorch's steps, each rounded.

    Args:
        x: [N, C, ...], usually [N, C, H, W], fp16/bf16/fp32/fp64, any strides; y has its type, and its layout where
            that is channels_last (4-D) or channels_last_3d (5-D), the fast ones; else y is contiguous.
        running_mean, running_var: [C] or both None; updated in place when `training`, used when not.
        weight, bias: [C] or None (1 and 0). Vectors have the type of x, or fp32 beside fp16 and bf16.
        training: normalize with the statistics of this batch.
        momentum: share of this batch in the running statistics.
        eps: added to the variance; 0 only where not `training`.
        residual: in the shape and on the device of x, taken in the type of x.
        residual_norm: the batch norm of the residual (the projection shortcut's), a
            `resnet_fast.functional.BatchNormArgs`; its vectors as those of x.
        relu: whether to end in ReLU.
        fork: return (y, alias of y), one for each of two consumers. The backward kernel then adds their two gradients
            in registers, where autograd would take a pass over memory. Neither handle alone sees the whole gradient of
            y, and neither may be changed in place.
        backend: "triton" or "aten" by name; None takes Triton wherever it runs.
        ghost_batch_size: with batch statistics, normalize every `ghost_batch_size` images, in order, by their own (the
            last group may be smaller), as if the function were called on each group and the results were concatenated:
            running statistics are updated group after group. None: all images together.

    Returns:
        y, or (y, alias) with `fork`.

    An x without elements gives a y without elements, gradients of zero, and leaves the running statistics alone.

    Raises (the exceptions of F.batch_norm, for what F.batch_norm refuses):
        ValueError: training with one value per channel (in any group) or with eps <= 0, eps < 0, one running statistic
            of two when training; ghost_batch_size < 1; the residual of another shape than x or on another device, an
            image of 2^31 pixels or nearly so in NCHW, or an unknown backend.
        RuntimeError: x has fewer than two dimensions; a vector of another shape than [C], type than the rule above
            allows, or device than x's; running statistics missing when not training, or requiring a gradient; or the
            backend asked for cannot run here.
        NotImplementedError: x is not of a type above.
        TypeError: x, the residual or a vector is no tensor, the residual not of a type above, residual_norm no
            BatchNormArgs, momentum is None, or ghost_batch_size is no int.

    Ioffe and Szegedy 2015, arXiv:1502.03167; He et al. 2015, arXiv:1512.03385, figure 2; Hoffer et al. 2017,
    arXiv:1705.08741, algorithm 1, for ghost batches.
    """
    check_type("relu", relu, bool)
    check_type("fork", fork, bool)
    norm = BatchNormArgs(running_mean, running_var, weight, bias, training, momentum, eps)
    call = find_call(x, norm, residual, residual_norm, relu, backend, None, ghost_batch_size)
    return call(x, norm, residual, residual_norm, fork)


def find_call(
    x: Tensor,
    norm: BatchNormArgs,
    residual: Tensor | None,
    residual_norm: BatchNormArgs | None,
    relu: bool,
    backend: Backend | None = None,
    group: distributed.Group | None = None,
    ghost_batch_size: int | None = None,
) -> Callable[..., Any]:
    """Check the arguments and return the function that computes the operation from (x, norm, residual, residual_norm,
    fork). Arguments of a kind that has been seen are not checked again. `group`: whose batch statistics are joint.
    """
    key = call = None
    if (
        group is None
        and backend is None
        and is_plain(x)
        and (type(residual) is not Tensor or unwrap_if_dead(residual) is residual)
        and not choices.is_replaced()
    ):
        key, call = _look_up(x, norm, residual, residual_norm, relu, ghost_batch_size)
    if call is None:
        check_arguments(x, norm, residual, residual_norm, group, ghost_batch_size)
        call = _choose_call(x, norm, residual, residual_norm, relu, backend, group, ghost_batch_size, key is not None)
        if key is not None and not _has_running_with_gradient(norm, residual_norm):
            if len(_calls) >= MAX_CALLS:
                del _calls[next(iter(_calls))]
            _calls[key] = call
    return call


# What runs for arguments that have been checked, by their kind: shapes, layouts, types and devices.
_calls: dict[tuple, Callable[..., Any]] = {}
MAX_CALLS = 4096


def _look_up(x: Tensor, norm, residual, residual_norm, relu: bool, ghost_batch_size) -> tuple[tuple | None, Any]:
    """Return the key of these arguments and the function stored under it; None and None if one has a wrong type.

    The key holds everything that is checked or compiled for, except addresses.
    """
    try:
        key = (x.shape, x.stride(), x.dtype, x.device, relu, ghost_batch_size, type(ghost_batch_size), *_kind(*norm))
        if residual is not None:
            key += type(residual), residual.shape, residual.stride(), residual.dtype, residual.device
        if residual_norm is not None:
            key += type(residual_norm), *_kind(*residual_norm)
        return key, _calls.get(key)
    except (AttributeError, TypeError):
        return None, None


def _kind(mean, var, weight, bias, training, momentum, eps) -> tuple:
    return (
        training, type(momentum), type(eps), eps,
        mean is None or (type(mean), mean.dtype, mean.shape, mean.stride(), mean.device, mean.requires_grad),
        var is None or (type(var), var.dtype, var.shape, var.stride(), var.device, var.requires_grad),
        weight is None or (type(weight), weight.dtype, weight.shape, weight.stride(), weight.device),
        bias is None or (type(bias), bias.dtype, bias.shape, bias.stride(), bias.device),
    )  # fmt: skip


def _has_running_with_gradient(*norms: BatchNormArgs | None) -> bool:
    """Whether a running statistic requires a gradient, which is refused if the grad mode is on."""
    running = [vector for norm in norms if norm is not None for vector in norm[:2]]
    return any(vector is not None and vector.requires_grad for vector in running)


def _choose_call(
    x: Tensor,
    norm: BatchNormArgs,
    residual: Tensor | None,
    residual_norm: BatchNormArgs | None,
    relu: bool,
    backend: Backend | None,
    group: distributed.Group | None,
    ghost_batch_size: int | None,
    can_plan: bool,
) -> Callable[..., Any]:
    """Return the function that runs checked arguments of this kind."""
    other = residual_norm or NO_NORM
    group_images = (ghost_batch_size or 0) if norm.training or other.training else 0
    _, settings = arguments_of(x, norm, residual, residual_norm, relu, group_images)
    if group is None and choose_backend(x, backend) == "aten":
        return functools.partial(_run_on_aten, settings)
    vectors = [vector for vector in (*norm[:4], *other[:4]) if vector is not None]
    if (
        can_plan
        and x.dim() == 4
        and dense(x) is x
        and (residual is None or (type(residual) is Tensor and residual.dtype == x.dtype))
        and (residual is None or dense(residual, like=x) is residual)
        and all(vector.is_contiguous() and type(vector) in (Tensor, torch.nn.Parameter) for vector in vectors)
        and all(type(number) in (float, int) for number in (*norm[5:], *other[5:]))
    ):
        plan = launch_plan.Plan(settings, batch_norm.forward, batch_norm.backward)
        return functools.partial(_run_planned, settings, plan)
    return functools.partial(_run_on_triton, settings, group)


def _run_on_aten(settings: Settings, x, norm, residual, residual_norm, fork: bool) -> Any:
    y = aten.batch_norm_add_relu(x, norm, residual, residual_norm, settings.relu, settings.ghost_batch_size)
    return (y, y) if fork else y


def _run_planned(settings: Settings, plan: Any, x, norm, residual, residual_norm, fork: bool) -> Any:
    """Run along the plan; tensors have the kernels' layout."""
    mean, var, weight, bias, _, momentum, _ = norm
    other_mean, other_var, other_weight, other_bias, _, other_momentum, _ = residual_norm or NO_NORM
    vectors = (weight, bias, other_weight, other_bias)
    inputs = (x, residual, *vectors, mean, var, momentum, other_mean, other_var, other_momentum)
    if torch.is_grad_enabled():
        return _apply(settings, fork, None, plan, *inputs)
    y, _ = plan.forward(*inputs)
    return (y, y) if fork else y


def _run_on_triton(
    settings: Settings, group: distributed.Group | None, x, norm, residual, residual_norm, fork: bool
) -> Any:
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        _refuse_forward_mode(x, residual, *norm[:4], *(residual_norm or ())[:4])
    image = as_image(dense(x))
    if residual is not None:
        residual = as_image(dense(residual.to(x.dtype), like=x))
    norms = (norm, residual_norm or NO_NORM)
    dense_norms = _dense_vectors(*norms)
    inputs, _ = arguments_of(image, dense_norms[0], residual, dense_norms[1])
    y = _BatchNormAddReLU.apply(settings, fork, group, None, *inputs)
    for given, used in zip(norms, dense_norms, strict=True):
        if given.training:
            _copy_back(given.running_mean, used.running_mean)
            _copy_back(given.running_var, used.running_var)
    if x.dim() == 4:
        return y
    return tuple(handle.view(x.shape) for handle in y) if fork else y.view(x.shape)


def _dense_vectors(*norms: BatchNormArgs) -> list[BatchNormArgs]:
    """The kernels address a vector by its first element alone. A vector that two norms share stays one."""
    vectors = {id(value): value.contiguous() for norm in norms for value in norm if isinstance(value, Tensor)}
    return [norm._make(vectors[id(value)] if isinstance(value, Tensor) else value for value in norm) for norm in norms]


def _copy_back(given: Tensor | None, used: Tensor | None) -> None:
    """What was updated in a contiguous copy, to the caller's running statistic."""
    if given is not None and used is not None and not given.is_contiguous():
        given.copy_(used)


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError if one is a dual tensor, of which the kernels know no tangent."""
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            'forward-mode differentiation does not go through the Triton kernels: pass backend="aten" to '
            "batch_norm_add_relu, or use torch.func.jvp, under which modules, too, run on ATen"
        )


class _BatchNormAddReLU(torch.autograd.Function):
    """On the Triton kernels: by a plan, by the operators, or with `group` for several processes.

    `inputs`: those of `Inputs`, flat, because autograd and tracers see tensors only so.
    """

    @staticmethod
    def forward(ctx: Any, settings, fork, group, plan, *inputs):
        ctx.settings, ctx.group, ctx.plan = settings, group, plan
        ctx.set_materialize_grads(False)
        if plan is not None:
            y, kept = plan.forward(*inputs)
        elif group is None:
            y, relu_mask, mean, rstd, *residual_statistics = batch_norm.forward_op(*inputs, *settings)
            if not settings.relu or settings.join == "none":
                relu_mask = None
            kept = (relu_mask, mean, rstd, *(residual_statistics if settings.join == "bn" else (None, None)))
        else:
            (y, *kept), ctx.total_rows = distributed.forward(Inputs._make(inputs), settings, group)
        x, residual, weight, bias, residual_weight, residual_bias = inputs[:6]
        if settings.join != "bn":
            residual = None
        ctx.save_for_backward(x, residual, weight, bias, residual_weight, residual_bias, *kept)
        return (y, y.view_as(y)) if fork else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_alias: Tensor | None = None):  # type: ignore[override]
        settings, group, plan, tensors = ctx.settings, ctx.group, ctx.plan, ctx.saved_tensors
        if dy is None:
            dy, dy_alias = dy_alias, None
        if dy is None:
            if group is None:
                return (None,) * len(ctx.needs_input_grad)
            dy = torch.zeros_like(tensors[0])  # the other processes wait for this one's part
        is_first = not torch.is_grad_enabled()
        is_planned = plan is not None and is_first and is_plain(dy) and (dy_alias is None or type(dy_alias) is Tensor)
        if is_planned:
            gradients = plan.backward(dy, dy_alias, tensors)  # type: ignore[union-attr]
        else:
            saved = Saved._make(tensors) if plan is None else plan.saved(tensors)
            if not is_first:  # double backward: the same gradients, by differentiable steps
                total_rows = None if group is None else ctx.total_rows
                gradients = differentiable_backward(dy, dy_alias, saved, settings, group, total_rows)
            elif group is None:
                gradients = batch_norm.backward_op(dy, dy_alias, *saved, *settings)
            else:
                gradients = distributed.backward(dy, dy_alias, saved, settings, ctx.total_rows, group)
        dx, dresidual, *vectors = gradients
        if settings.join == "add" and not settings.relu and dy_alias is None:
            dresidual = dy  # nothing stands between y and the residual
        gradients = (dx, dresidual, *vectors)
        if not is_planned:  # operators return empty tensors for what there is not
            wanted = ctx.needs_input_grad[4:]
            gradients = [one if want else None for one, want in zip(gradients, wanted, strict=False)]
        return None, None, None, None, *gradients, None, None, None, None, None, None


# torch's own `apply` asks again whether functorch transforms, and unwraps tensors that have left it (`is_plain`).
_apply: Any = super(torch.autograd.Function, _BatchNormAddReLU).apply  # type: ignore[misc]


def differentiable_backward(
    dy: Tensor,
    dy_alias: Tensor | None,
    saved: Saved,
    settings: Settings,
    group: distributed.Group | None = None,
    total_rows: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients as differentiable functions of dy and of the inputs, through the reference formula."""
    join, relu, training, residual_training, ghost_batch_size, eps, residual_eps = settings

    def bn(x, mean, rstd, weight, bias, training: bool, eps: float) -> Tensor:
        groups = x.split(ghost_batch_size or max(len(x), 1))
        group_statistics = zip(groups, mean.view(len(groups), -1), rstd.view(len(groups), -1), strict=True)
        parts = [bn_of_group(*one_group, weight, bias, training, eps) for one_group in group_statistics]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def bn_of_group(x, mean, rstd, weight, bias, training: bool, eps: float) -> Tensor:
        # About the forward's mean, here a constant, so that large means leave the digits of x - mean alone.
        x, mean = x.to(mean.dtype) - mean[None, :, None, None], torch.zeros_like(mean)
        if training:
            if group is None or total_rows is None:
                mean, var = reference.statistics(x)
            else:
                mean, var = distributed.differentiable_statistics(x, total_rows, group)
            rstd = (var + eps).rsqrt()
        return reference.normalize(x, mean, rstd, weight, bias)

    with torch.enable_grad():
        # Fresh handles: a path from one input to another is the outer graph's to follow, not this one's.
        saved = Saved._make(t if t is None or not t.requires_grad else t.view_as(t) for t in saved)
        z = bn(saved.x, saved.mean, saved.rstd, saved.weight, saved.bias, training, eps)
        if join == "bn":
            statistics, affine = (saved.residual_mean, saved.residual_rstd), saved[4:6]
            z = z + bn(saved.residual, *statistics, *affine, residual_training, residual_eps)
        dz = dy if dy_alias is None else dy + dy_alias
        if relu:
            dz = dz.masked_fill(_relu_closed(saved, settings), 0)
        wanted = [tensor is not None and tensor.requires_grad for tensor in saved[:6]]
        inputs: Any = [*itertools.compress(saved, wanted)]
        gradients = iter(torch.autograd.grad(z, inputs, dz.to(z.dtype), create_graph=True) if inputs else ())
    dx, dresidual, *vectors = (next(gradients) if want else None for want in wanted)
    return dx, dz if join == "add" else dresidual, *vectors


def _relu_closed(saved: Saved, settings: Settings) -> Tensor:
    """Where the forward's ReLU closed, a bool tensor like x: its own rounding of y decides, not another formula's."""
    if saved.relu_mask is None:
        return batch_norm.recompute_y(saved, settings) <= 0
    if saved.relu_mask.dtype == torch.bool:
        return saved.relu_mask
    return reference.unpack_relu_mask(saved.relu_mask, saved.x, settings.ghost_batch_size)
