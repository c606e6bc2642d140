"""A batch norm and the following 3x3 convolution as one function, which runs only if a table of choices names it.

    z = conv(y),  y = relu(bn(x) + residual)

The convolution's kernel also computes the statistics of z for the next batch norm. Its data-gradient kernel also
computes the sums of this batch norm's backward. Each saves a pass over memory (kernels/README.md, "3x3 convolution").
No GPU has shown yet where that is faster, so `resnet-fast tune` must have measured it (ops/choices.py).
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.kernels.conv_tiles import CHANNEL_MULTIPLE, MAX_ROWS, WIDTHS, ConvTiles

from .functional import differentiable_backward
from .nn import FusedBatchNorm2d
from .ops import choose_backend
from .ops.arguments import Gradients, Inputs, PartialStatistics, Saved, Settings, arguments_of, join_of
from .ops.backend import conv3x3, device_guard, is_plain, launch
from .ops.batch_norm import backward, forward
from .ops.checks import check_arguments
from .ops.choices import choose, is_empty
from .ops.implementations import DTYPES, Operation, Problem
from .ops.layout import dense


def can_pair(x: Tensor, norms: Iterable[nn.Module]) -> bool:
    """Return whether x's device has a table of choices, and all norms of the network train and can take part."""
    if not is_plain(x) or is_empty(x.device) or not torch.is_grad_enabled():
        return False
    return choose_backend(x) == "triton" and all(map(_takes_part, norms))


def _takes_part(norm: Any) -> bool:
    """Return whether the norm uses batch statistics over all rows of this process and no others."""
    vectors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return (
        type(norm) is FusedBatchNorm2d
        and norm.training
        and norm.ghost_batch_size is None
        and all(vector is None or vector.is_contiguous() for vector in vectors)
    )


def pair(
    norm: FusedBatchNorm2d,
    x: Tensor,
    conv: Any,
    statistics: PartialStatistics | None = None,
    residual: Tensor | None = None,
    residual_norm: FusedBatchNorm2d | None = None,
    fork: bool = False,
) -> tuple[Tensor, PartialStatistics | None, Tensor]:
    """Compute conv(relu(bn(x) + residual)) in training.

    Args:
        x, residual: [N, C, H, W].
        conv: the convolution that reads the batch norm's output, or None.
        statistics: partial statistics of x, if the previous convolution has computed them.
        residual_norm: the batch norm of the residual.
        fork: whether the convolution's input has a second consumer, which gets the third result.

    Returns:
        The convolution's output, its partial statistics or None, and a second handle to its input.
    """
    tiles = gradient_tiles = None
    if conv is not None and _has_kernels_for(conv, x):
        tiles = _choose("convolution", conv, x)
        gradient_tiles = _choose("data gradient", conv, x, join_of(residual, residual_norm), fork)
    is_pair = tiles is not None or gradient_tiles is not None
    if statistics is None and not is_pair:
        y = norm.fused(x, residual, residual_norm, relu=True, fork=fork)
        y, second = y if fork else (y, y)
        return y if conv is None else conv(y), None, second
    arguments, residual_arguments = norm.arguments(), None if residual_norm is None else residual_norm.arguments()
    check_arguments(x, arguments, residual, residual_arguments)
    for module in (norm,) if residual_norm is None else (norm, residual_norm):
        module.count(1)
    if residual is not None:
        residual = dense(residual.to(x.dtype), like=x)
    inputs, settings = arguments_of(x, arguments, residual, residual_arguments)
    conv_weight = None if conv is None or not is_pair else conv.weight
    z, y, partials, rows = _Pair.apply(settings, statistics, tiles, gradient_tiles, conv_weight, *inputs)
    if conv is not None and not is_pair:
        z = conv(z)
    return z, None if partials is None else PartialStatistics(partials, rows), y


def _choose(operation: Operation, conv: Any, x: Tensor, join: str = "none", fork: bool = False) -> ConvTiles | None:
    n_images, n_in_channels, _, width = x.shape
    problem = Problem(operation, DTYPES[x.dtype], n_images, n_in_channels, conv.weight.shape[0], width, join, fork)
    return choose(problem, x.device).tiles


def _has_kernels_for(conv: Any, x: Tensor) -> bool:
    """Return whether the kernels compute what conv computes of a tensor like x, in the same type."""
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or not conv.training:
        return False
    if x.dtype not in DTYPES or not _is_for_descriptors(x):
        return False
    device_type = x.device.type
    autocasts = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocasts else conv.weight.dtype
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return dtype == x.dtype and has_kernels(x, conv.weight, conv.bias, *geometry)


def has_kernels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Return whether the kernels compute F.conv2d of these arguments, for any type and layout of x."""
    if x.dim() != 4 or weight.shape[2:] != (3, 3) or bias is not None or groups != 1:
        return False
    n_images, n_in_channels, height, width = x.shape
    return (
        all(setting in (1, (1, 1), [1, 1]) for setting in (stride, padding, dilation))
        and n_in_channels == weight.shape[1]
        and all(n % CHANNEL_MULTIPLE == 0 for n in weight.shape[:2])
        and height == width
        and width in WIDTHS
        and 0 < n_images * height * width <= MAX_ROWS
    )


def _is_for_descriptors(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and x.data_ptr() % 16 == 0


def _for_descriptors(x: Tensor) -> Tensor:
    """Return x dense and aligned, as tensor descriptors need it; a view may have gaps and any address."""
    return x if _is_for_descriptors(x) else x.clone(memory_format=torch.channels_last)


class _Pair(torch.autograd.Function):
    """Compute z = conv(y), or z = y without `conv_weight`.

    `statistics`: those of x, or None if x needs a pass for them. `tiles`, `gradient_tiles`: None if cuDNN computes.
    """

    @staticmethod
    def forward(ctx: Any, settings, statistics, tiles, gradient_tiles, conv_weight, *inputs):
        given = Inputs._make(inputs)
        outputs = forward(given, settings, statistics)
        x, y, saved = given.x, outputs.y, Saved.of(given, settings, outputs)
        ctx.settings, ctx.tiles = settings, gradient_tiles
        ctx.set_materialize_grads(False)
        if conv_weight is None:
            ctx.save_for_backward(*saved)
            return y, y.view_as(y), None, 0
        cast_weight = _for_descriptors(conv_weight.to(x.dtype, memory_format=torch.channels_last))
        ctx.save_for_backward(*saved, y, conv_weight, cast_weight)
        if tiles is None:
            return F.conv2d(y, cast_weight, padding=1), y, None, 0
        with device_guard(x):
            z, (partials, rows_per_split) = conv3x3.forward(y, cast_weight, tiles)
        ctx.mark_non_differentiable(partials)
        return z, y, partials, rows_per_split

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, dy_alias: Tensor | None, *_):  # type: ignore[override]
        tensors, n = ctx.saved_tensors, len(Saved._fields)  # read once: under checkpointing each read unpacks them
        saved, convolution = Saved._make(tensors[:n]), tensors[n:]
        _, _, _, _, wants_dconv_weight, *wants = ctx.needs_input_grad
        wants_dy = any(wants)
        dy, dconv_weight, gradients = dz, None, None
        if dz is not None and convolution:
            y, conv_weight, cast_weight = convolution
            weight = conv_weight.to(y.dtype) if torch.is_grad_enabled() else cast_weight
            # Double backward has no kernels.
            tiles: Any = None if torch.is_grad_enabled() or not wants_dy else ctx.tiles
            dz = _for_descriptors(dense(dz, like=y))
            dy, dconv_weight = library_gradients(dz, y, weight, wants_dy and tiles is None, wants_dconv_weight)
            if dconv_weight is not None:
                dconv_weight = dconv_weight.to(conv_weight.dtype)
            if tiles is not None:
                dy_alias = None if dy_alias is None else dense(dy_alias, like=y)
                gradients = gradients_by_kernels(dz, weight, tiles, saved, ctx.settings, dy_alias)
        if dy is None:
            dy, dy_alias = dy_alias, None
        if gradients is None and dy is not None and wants_dy:
            run = differentiable_backward if torch.is_grad_enabled() else backward
            gradients = run(dy, dy_alias, saved, ctx.settings)
        return None, None, None, None, dconv_weight, *(gradients or (None,) * 6), *(None,) * 6


def gradients_by_kernels(
    dout: Tensor, weight: Tensor, tiles: ConvTiles, saved: Saved, settings: Settings, dy_alias: Tensor | None
) -> Gradients:
    """Return the batch norm's gradients from the convolution's data gradient and the batch norm's second pass."""
    with device_guard(dout):
        dz, sums, gradients = conv3x3.data_gradient(dout, weight, tiles, saved, dy_alias)
        return launch.input_gradients(dz, dz, saved, settings, launch.Shape.of(dz), gradients, sums)


def library_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, wants_dx: bool, wants_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return dx and dweight of the convolution by ATen, such as by cuDNN; differentiable."""
    if not wants_dx and not wants_dweight:
        return None, None
    ones, mask = [1, 1], [wants_dx, wants_dweight, False]
    dx, dweight, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, ones, ones, ones, False, [0, 0], 1, mask)
    return dx, dweight
