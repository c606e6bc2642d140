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
    """Apply batch norm, add a residual and apply ReLU in one operation.

        y = max(0, bn(x) + r),   bn(x) = (x - mean) / sqrt(var + eps) * weight + bias

    r is 0, `residual`, or bn(residual) with the statistics and parameters of `residual_norm`. The first eight arguments
    are those of F.batch_norm.

    Numerics: fp32 arithmetic (fp64 for fp64 x); y is rounded once. Batch variances are merged by Chan's formula, never
    computed as E[x²] - E[x]². Normalization uses the biased variance; running_var receives the unbiased one. Repeated
    runs are bit-identical. The ATen backend runs eager PyTorch's steps and rounds after each.

    Args:
        x: [N, C, ...], usually [N, C, H, W], fp16/bf16/fp32/fp64, any strides. y has the same type. It keeps the fast
            layouts, channels_last (4-D) and channels_last_3d (5-D); otherwise it is contiguous.
        running_mean, running_var: [C], updated in place if `training`, else used; both None only if `training`.
        weight, bias: [C], or None for 1 and 0. All vectors have the type of x; for fp16 and bf16 x all may be fp32.
        training: whether to normalize with the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance; positive if `training`, else at least 0.
        residual: fp16/bf16/fp32/fp64, with the shape and device of x; cast to the type of x.
        residual_norm: the batch norm of the residual (of a projection shortcut), a
            `resnet_fast.functional.BatchNormArgs`. Its vectors follow the same rules.
        relu: whether to end in ReLU.
        fork: whether to return (y, alias of y), one handle for each of two consumers. The backward kernel then adds the
            two gradients in registers; autograd would need a pass over memory. Each handle sees only its own gradient.
            Modify neither in place.
        backend: "triton", "aten", or None for Triton wherever it runs.
        ghost_batch_size: if batch statistics are used, normalize each group of this many consecutive images with its
            own statistics; the last group may be smaller. The result is as if the function were called on each group in
            order and the outputs concatenated, so each group updates the running statistics. None: one group.

    Returns:
        y, or (y, alias) with `fork`. If x has no elements, neither has y; gradients are zero and the running statistics
        stay unchanged.

    Raises:
        ValueError: training with one value per channel (in any group), with eps <= 0, or with only one running
            statistic; eps < 0; ghost_batch_size < 1; residual_norm without residual; a residual whose shape or device
            is not x's; an NCHW image of nearly 2^31 pixels or more; an unknown backend.
        RuntimeError: x has fewer than two dimensions; a vector's shape is not [C], its device is not x's, or the rule
            above excludes its type; a running statistic is missing when not training, or requires a gradient; "triton"
            is requested but cannot run here.
        NotImplementedError: x has another type; forward-mode differentiation on the Triton kernels.
        TypeError: x, residual or a vector is not a Tensor; residual has another type; residual_norm is not a
            BatchNormArgs; momentum or eps is not a number; ghost_batch_size is not an int; relu or fork is not a bool.

    If F.batch_norm refuses the same arguments, the type of its exception is raised.

    Ioffe and Szegedy 2015, arXiv:1502.03167; He et al. 2015, arXiv:1512.03385, figure 2; for ghost batches, Hoffer et
    al. 2017, arXiv:1705.08741, algorithm 1.
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
    """Check the arguments and return a function of (x, norm, residual, residual_norm, fork) that runs the operation.

    Arguments like those of an earlier call are not checked again. `group`: the processes that share batch statistics.
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


# The functions for arguments that passed the checks, by their shapes, layouts, types and devices.
_calls: dict[tuple, Callable[..., Any]] = {}
MAX_CALLS = 4096


def _look_up(x: Tensor, norm, residual, residual_norm, relu: bool, ghost_batch_size) -> tuple[tuple | None, Any]:
    """Return the key of these arguments and the function stored under it, or (None, None) if a type is wrong.

    The key holds everything that the checks and the compiled kernels depend on, except addresses.
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
    """Return whether a running statistic requires a gradient, which is an error only in grad mode."""
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
    """Return the function for arguments like these, which passed the checks."""
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
    """Run a launch plan on tensors that have the kernels' layout."""
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
    """Return the norms with contiguous vectors, as the kernels need; a vector that two norms share stays shared."""
    vectors = {id(value): value.contiguous() for norm in norms for value in norm if isinstance(value, Tensor)}
    return [norm._make(vectors[id(value)] if isinstance(value, Tensor) else value for value in norm) for norm in norms]


def _copy_back(given: Tensor | None, used: Tensor | None) -> None:
    """Copy the updated contiguous copy back to the caller's running statistic."""
    if given is not None and used is not None and not given.is_contiguous():
        given.copy_(used)


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError if one is a dual tensor: the kernels do not propagate tangents."""
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            'the Triton kernels do not support forward-mode differentiation: pass backend="aten" to '
            "batch_norm_add_relu, or use torch.func.jvp, under which modules run on ATen, too"
        )


class _BatchNormAddReLU(torch.autograd.Function):
    """Run on the Triton kernels: by a plan, by the operators, or over the processes of `group`.

    `inputs`: the fields of `Inputs`, flat, because autograd and tracers do not look for tensors inside a tuple.
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
            dy = torch.zeros_like(tensors[0])  # the other processes wait for this one's sums
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
        if not is_planned:  # operators return empty tensors for absent inputs
            wanted = ctx.needs_input_grad[4:]
            gradients = [one if want else None for one, want in zip(gradients, wanted, strict=False)]
        return None, None, None, None, *gradients, None, None, None, None, None, None


# torch's own `apply` would check again for functorch transforms and their dead wrappers, which `is_plain` rules out.
_apply: Any = super(torch.autograd.Function, _BatchNormAddReLU).apply  # type: ignore[misc]


def differentiable_backward(
    dy: Tensor,
    dy_alias: Tensor | None,
    saved: Saved,
    settings: Settings,
    group: distributed.Group | None = None,
    total_rows: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients as differentiable functions of dy and the inputs, through the reference formula."""
    join, relu, training, residual_training, ghost_batch_size, eps, residual_eps = settings

    def bn(x, mean, rstd, weight, bias, training: bool, eps: float) -> Tensor:
        groups = x.split(ghost_batch_size or max(len(x), 1))
        group_statistics = zip(groups, mean.view(len(groups), -1), rstd.view(len(groups), -1), strict=True)
        parts = [bn_of_group(*one_group, weight, bias, training, eps) for one_group in group_statistics]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def bn_of_group(x, mean, rstd, weight, bias, training: bool, eps: float) -> Tensor:
        # Subtract the forward's mean first, as a constant, so that a large mean does not cost digits of x - mean.
        x, mean = x.to(mean.dtype) - mean[None, :, None, None], torch.zeros_like(mean)
        if training:
            if group is None or total_rows is None:
                mean, var = reference.statistics(x)
            else:
                mean, var = distributed.differentiable_statistics(x, total_rows, group)
            rstd = (var + eps).rsqrt()
        return reference.normalize(x, mean, rstd, weight, bias)

    with torch.enable_grad():
        # Fresh handles: if one input depends on another, the outer graph follows that path, not this one.
        saved = Saved._make(t if t is None or not t.requires_grad else t.view_as(t) for t in saved)
        z = bn(saved.x, saved.mean, saved.rstd, saved.weight, saved.bias, training, eps)
        if join == "bn":
            statistics, affine = (saved.residual_mean, saved.residual_rstd), saved[4:6]
            z = z + bn(saved.residual, *statistics, *affine, residual_training, residual_eps)
        dz = dy if dy_alias is None else dy + dy_alias
        if relu:
            dz = dz.masked_fill(_relu_mask(saved, settings), 0)
        wanted = [tensor is not None and tensor.requires_grad for tensor in saved[:6]]
        inputs: Any = [*itertools.compress(saved, wanted)]
        gradients = iter(torch.autograd.grad(z, inputs, dz.to(z.dtype), create_graph=True) if inputs else ())
    dx, dresidual, *vectors = (next(gradients) if want else None for want in wanted)
    return dx, dz if join == "add" else dresidual, *vectors


def _relu_mask(saved: Saved, settings: Settings) -> Tensor:
    """Return where ReLU's output is 0, a bool tensor like x, by the forward's own rounding."""
    if saved.relu_mask is None:
        return batch_norm.recompute_y(saved, settings) <= 0
    if saved.relu_mask.dtype == torch.bool:
        return saved.relu_mask
    return reference.unpack_relu_mask(saved.relu_mask, saved.x, settings.ghost_batch_size)
