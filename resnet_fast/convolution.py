"""3x3 convolutions that compute sums for the batch norms around them: statistics forward, Σ dz and Σ dz·x̂ backward.

    out, shortcut = convolve(conv1, x, shortcut)
    out = norm1.fused(out, relu=True, consumer=conv2)
    out, _ = convolve(conv2, out)

A batch norm that is told its consumer may return an `Activation` in place of a tensor: then the convolution's backward
adds the shortcut's gradient where the input has two consumers, takes it through that batch norm's ReLU, and adds it up.
All of it only where the table of choices says so (ops/choices.py); without entries these are `conv(x)`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.kernels.conv_tiles import CHANNEL_MULTIPLE, MAX_ROWS, WIDTHS

from .ops import choose_backend
from .ops.arguments import PartialStatistics, Saved
from .ops.backend import conv3x3, device_guard
from .ops.choices import choose, is_empty
from .ops.implementations import CUDNN, DTYPES, Choice, Operation, Problem
from .ops.layout import dense


class Convolved(NamedTuple):
    """A convolution's output, [N, C, H, W], and its statistics in parts."""

    y: Tensor
    statistics: PartialStatistics


class Activation(NamedTuple):
    """relu(bn(x) + residual) on its way to one convolution, and with `fork` to a shortcut.

    `token`, [2 or 3, 1, C], stands for the sums of the batch norm's backward, which come back as its gradient; `norm`
    and `relu` say how they are computed.
    """

    y: Tensor
    token: Tensor
    norm: Saved
    relu: bool
    fork: bool
    choice: Choice  # of the convolution's data gradient


Handle = Tensor | Activation  # what a block hands to the next one's first convolution


class Plan(NamedTuple):
    """What computes the convolution and its gradients."""

    forward: Choice
    data_gradient: Choice
    weight_gradient: Choice


def convolve(conv: Any, x: Handle, shortcut: Tensor | None = None) -> tuple[Any, Tensor | None]:
    """`conv(x)`, as a tensor or `Convolved`, and the shortcut's handle to x: `shortcut`, or x's own second one."""
    is_activation = isinstance(x, Activation)
    tensor: Tensor = x.y if is_activation else x  # type: ignore[assignment]
    if not is_activation and not _is_chosen_for(conv, tensor):
        return conv(tensor), shortcut
    data_gradient = x.choice if is_activation else Choice(CUDNN)  # type: ignore[union-attr]
    plan = Plan(_choose("convolution", conv, tensor), data_gradient, _choose("weight gradient", conv, tensor))
    if all(choice.tiles is None for choice in plan):
        return conv(tensor), shortcut
    norm_arguments = (x.token, x.norm, x.relu, x.fork) if is_activation else (None, None, False, False)  # type: ignore[union-attr]
    y, x_alias, partials, rows_per_part = _Conv3x3.apply(tensor, conv.weight, *norm_arguments, plan)
    out = y if partials is None else Convolved(y, PartialStatistics(partials, rows_per_part))
    return out, shortcut if x_alias is None else x_alias


def choose_data_gradient(conv: nn.Module | None, y: Tensor, join: str, fork: bool) -> Choice:
    """What computes the gradient of y, the output of a batch norm with this join, which `conv` is to consume."""
    if conv is None or not _is_chosen_for(conv, y):
        return Choice(CUDNN)
    return _choose("data gradient", conv, y, join, fork)


def _choose(operation: Operation, conv: Any, x: Tensor, join: str = "none", fork: bool = False) -> Choice:
    n_images, n_in_channels, _, width = x.shape
    return choose(
        Problem(operation, DTYPES[x.dtype], n_images, n_in_channels, conv.weight.shape[0], width, join, fork), x.device
    )


def _is_chosen_for(conv: Any, x: Tensor) -> bool:
    """Whether there are choices, and conv(x) in training is a convolution that the kernels have."""
    # torch.compile keeps its own.
    if torch.compiler.is_compiling() or is_empty(x.device) or not (torch.is_grad_enabled() and conv.training):
        return False
    # A subclass of Tensor, such as FakeTensor, is for operators alone.
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or x.dtype not in DTYPES or type(x) is not Tensor:
        return False
    if not has_kernels(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups):
        return False
    device_type = x.device.type
    autocasts = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocasts else conv.weight.dtype
    return _is_for_descriptors(x) and dtype == x.dtype and choose_backend(x) == "triton"


def has_kernels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Whether the kernels compute F.conv2d of these arguments, whatever type and layout x has."""
    if x.dim() != 4 or weight.shape[2:] != (3, 3) or bias is not None or groups != 1:
        return False
    n_images, n_in_channels, height, width = x.shape
    return (
        all(pair in (1, (1, 1), [1, 1]) for pair in (stride, padding, dilation))
        and n_in_channels == weight.shape[1]
        and all(n % CHANNEL_MULTIPLE == 0 for n in weight.shape[:2])
        and height == width
        and width in WIDTHS
        and 0 < n_images * height * width <= MAX_ROWS
    )


def _is_for_descriptors(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and x.data_ptr() % 16 == 0


def _for_descriptors(x: Tensor) -> Tensor:
    """x as a tensor descriptor takes it: a view of another tensor may lie at any address, and with gaps."""
    return x if _is_for_descriptors(x) else x.clone(memory_format=torch.channels_last)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        token: Tensor | None,
        norm: Saved | None,
        relu: bool,
        fork: bool,
        plan: Plan,
    ):
        weight_of_x = _for_descriptors(weight.to(x.dtype, memory_format=torch.channels_last))
        partials, rows_per_part = None, 0
        if plan.forward.tiles is None:
            y = F.conv2d(x, weight_of_x, padding=1)
        else:
            with device_guard(x):
                y, (partials, rows_per_part) = conv3x3.forward(x, weight_of_x, plan.forward.tiles)
            ctx.mark_non_differentiable(partials)
        ctx.save_for_backward(x, weight, weight_of_x, *(norm or ()))
        ctx.relu, ctx.plan = relu, plan
        ctx.set_materialize_grads(False)
        return y, x.view_as(x) if fork else None, partials, rows_per_part

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dx_alias: Tensor | None, *_):  # type: ignore[override]
        x, weight, weight_of_x, *norm = ctx.saved_tensors
        wants_dx, wants_dweight, *_ = ctx.needs_input_grad
        rest = (None,) * (len(ctx.needs_input_grad) - 3)
        if dy is None:
            return dx_alias, None, None, *rest
        if torch.is_grad_enabled():  # double backward: differentiable steps, without the sums
            dx, dweight = library_gradients(dy, x, weight.to(x.dtype), wants_dx, wants_dweight)
            if dx is not None and dx_alias is not None:
                dx = dx + dx_alias
            return dx, None if dweight is None else dweight.to(weight.dtype), None, *rest
        dy = _for_descriptors(dense(dy, like=x))
        data_tiles, weight_tiles = ctx.plan.data_gradient.tiles, ctx.plan.weight_gradient.tiles
        by_library = (wants_dx and data_tiles is None, wants_dweight and weight_tiles is None)
        dx = dweight = dtoken = None
        if any(by_library):
            dx, dweight = library_gradients(dy, x, weight_of_x, *by_library)
            dweight = None if dweight is None else dweight.to(weight.dtype)
        with device_guard(x):
            if wants_dx and data_tiles is not None:
                dx_alias = None if dx_alias is None else dense(dx_alias, like=x)
                saved = Saved._make(norm)  # only an Activation has tiles
                dx, dtoken = conv3x3.data_gradient(dy, weight_of_x, data_tiles, saved, ctx.relu, dx_alias)
            if wants_dweight and weight_tiles is not None:
                dweight = conv3x3.weight_gradient(x, dy, weight_tiles, weight.dtype)
        return dx, dweight, dtoken, *rest


def library_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, wants_dx: bool, wants_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dweight by cuDNN, or what else ATen calls; differentiable."""
    pair, mask = [1, 1], [wants_dx, wants_dweight, False]
    dx, dweight, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, pair, pair, pair, False, [0, 0], 1, mask)
    return dx, dweight
