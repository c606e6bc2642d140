"""Allocates outputs and partial results, chooses grids and launches the Triton kernels. Imports triton.

Tensors arrive checked: 4-D, on one device, dense, and all image-shaped ones in the layout of x.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from resnet_fast.kernels import batch_norm_backward, batch_norm_forward, tiles

from .arguments import BatchNormArgs, Gradients, Join, Outputs, Saved, accumulation_type


class Shape(NamedTuple):
    """A 4-D tensor as the kernels see it: rows, channels and pixels per image, in one of two layouts."""

    n_rows: int
    n_channels: int
    n_spatial: int
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> "Shape":
        n_images, n_channels, height, width = x.shape
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return cls(n_images * height * width, n_channels, height * width, channels_last)

    @property
    def channel_group(self) -> int:
        """Channels to one 16-byte access of a 16-bit type, where there are whole ones."""
        return 8 if self.n_channels % 8 == 0 else 1

    @property
    def relu_mask(self) -> tuple[int, int]:
        """The shape of the ReLU bits, in bytes (kernels/tile_access.py: bit_offsets)."""
        if self.channels_last:
            return self.n_rows, -(-self.n_channels // 8)
        return self.n_channels, -(-self.n_rows // 8)


def run(kernel, grid: tuple, **arguments) -> None:
    """The one place where a kernel is launched."""
    kernel[grid](**arguments, num_warps=tiles.NUM_WARPS)


def statistics(x: Tensor, norm: BatchNormArgs) -> tuple[Tensor, Tensor]:
    """mean and rstd [C] of the pass: the batch's (running statistics updated in place), or the tracked ones."""
    shape = Shape.of(x)
    cut = tiles.choose_tiles(*shape)
    mean = torch.empty(shape.n_channels, dtype=accumulation_type(x), device=x.device)
    rstd = torch.empty_like(mean)
    partial_mean = partial_m2 = None
    if norm.training:
        partial_mean, partial_m2 = mean.new_empty(2, cut.n_splits, shape.n_channels).unbind()
        run(
            batch_norm_forward.statistics_kernel,
            (cut.n_splits * cut.n_channel_tiles,),
            x_ptr=x,
            partial_mean_ptr=partial_mean,
            partial_m2_ptr=partial_m2,
            n_rows=shape.n_rows,
            n_channels=shape.n_channels,
            n_spatial=shape.n_spatial,
            rows_per_split=cut.rows_per_split,
            CHANNELS_LAST=shape.channels_last,
            CHANNEL_GROUP=shape.channel_group,
            BLOCK_M=cut.block_m,
            BLOCK_C=cut.block_c,
        )
    run(
        batch_norm_forward.combine_statistics_kernel,
        (triton.cdiv(shape.n_channels, tiles.COMBINE_BLOCK_C),),
        x_ptr=x,
        partial_mean_ptr=partial_mean,
        partial_m2_ptr=partial_m2,
        running_mean_ptr=norm.running_mean,
        running_var_ptr=norm.running_var,
        mean_ptr=mean,
        rstd_ptr=rstd,
        n_rows=shape.n_rows,
        n_channels=shape.n_channels,
        n_spatial=shape.n_spatial,
        n_splits=cut.n_splits,
        rows_per_split=cut.rows_per_split,
        momentum=norm.momentum,
        eps=norm.eps,
        TRAINING=norm.training,
        CHANNELS_LAST=shape.channels_last,
        BLOCK_S=tiles.COMBINE_BLOCK_S,
        BLOCK_C=tiles.COMBINE_BLOCK_C,
    )
    return mean, rstd


def forward(
    x: Tensor, norm: BatchNormArgs, residual: Tensor | None, residual_norm: BatchNormArgs | None, relu: bool
) -> Outputs:
    """relu(bn(x) + residual); ReLU's bits are written where there is a residual."""
    mean, rstd = statistics(x, norm)
    residual_mean = residual_rstd = None
    if residual is not None and residual_norm is not None:
        residual_mean, residual_rstd = statistics(residual, residual_norm)
    shape = Shape.of(x)
    cut = tiles.choose_tiles(*shape)
    y = torch.empty_like(x)
    relu_mask = None
    if relu and residual is not None:
        relu_mask = torch.empty(shape.relu_mask, dtype=torch.uint8, device=x.device)
    run(
        batch_norm_forward.normalize_kernel,
        (cut.n_row_tiles * cut.n_channel_tiles,),
        x_ptr=x,
        mean_ptr=mean,
        rstd_ptr=rstd,
        weight_ptr=norm.weight,
        bias_ptr=norm.bias,
        residual_ptr=residual,
        residual_mean_ptr=residual_mean,
        residual_rstd_ptr=residual_rstd,
        residual_weight_ptr=residual_norm.weight if residual_norm else None,
        residual_bias_ptr=residual_norm.bias if residual_norm else None,
        y_ptr=y,
        relu_mask_ptr=relu_mask,
        n_rows=shape.n_rows,
        n_channels=shape.n_channels,
        n_spatial=shape.n_spatial,
        RELU=relu,
        CHANNELS_LAST=shape.channels_last,
        CHANNEL_GROUP=shape.channel_group,
        BLOCK_M=cut.block_m,
        BLOCK_C=cut.block_c,
    )
    return Outputs(y, relu_mask, mean, rstd, residual_mean, residual_rstd)


def backward(
    dy: Tensor, dy_alias: Tensor | None, saved: Saved, join: Join, relu: bool, training: bool, residual_training: bool
) -> Gradients:
    """Gradients of relu(bn(x) + residual): one pass for the sums, one for dx (and the bn join's dresidual)."""
    shape = Shape.of(saved.x)
    cut = tiles.choose_tiles(*shape)
    sums_cut = tiles.choose_tiles(*shape, tiles.REDUCE_TILE_ELEMENTS)
    # Behind a mask or a fork the second pass would read more than dz; else it reads dy and recomputes ReLU from x.
    writes_dz = saved.relu_mask is not None or dy_alias is not None
    dz = torch.empty_like(saved.x) if writes_dz else None
    is_bn_join = join == "bn"
    partials = saved.mean.new_empty(3 if is_bn_join else 2, sums_cut.n_splits, shape.n_channels).unbind()
    sums = saved.mean.new_empty(3 if is_bn_join else 2, shape.n_channels).unbind()
    run(
        batch_norm_backward.reduce_kernel,
        (sums_cut.n_splits * sums_cut.n_channel_tiles,),
        dy_ptr=dy,
        dy_alias_ptr=dy_alias,
        relu_mask_ptr=saved.relu_mask,
        x_ptr=saved.x,
        mean_ptr=saved.mean,
        rstd_ptr=saved.rstd,
        weight_ptr=saved.weight,
        bias_ptr=saved.bias,
        residual_ptr=saved.residual,
        residual_mean_ptr=saved.residual_mean,
        residual_rstd_ptr=saved.residual_rstd,
        dz_ptr=dz,
        partial_dz_ptr=partials[0],
        partial_dz_xhat_ptr=partials[1],
        partial_dz_rhat_ptr=partials[2] if is_bn_join else None,
        n_rows=shape.n_rows,
        n_channels=shape.n_channels,
        n_spatial=shape.n_spatial,
        rows_per_split=sums_cut.rows_per_split,
        RELU=relu,
        CHANNELS_LAST=shape.channels_last,
        CHANNEL_GROUP=shape.channel_group,
        BLOCK_M=sums_cut.block_m,
        BLOCK_C=sums_cut.block_c,
    )
    dweight, dbias, dresidual_weight, dresidual_bias = (
        None if parameter is None else torch.empty_like(parameter)
        for parameter in (saved.weight, saved.bias, saved.residual_weight, saved.residual_bias)
    )
    run(
        batch_norm_backward.combine_gradients_kernel,
        (triton.cdiv(shape.n_channels, tiles.COMBINE_BLOCK_C),),
        partial_dz_ptr=partials[0],
        partial_dz_xhat_ptr=partials[1],
        partial_dz_rhat_ptr=partials[2] if is_bn_join else None,
        sum_dz_ptr=sums[0],
        sum_dz_xhat_ptr=sums[1],
        sum_dz_rhat_ptr=sums[2] if is_bn_join else None,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        dresidual_weight_ptr=dresidual_weight,
        dresidual_bias_ptr=dresidual_bias,
        n_channels=shape.n_channels,
        n_splits=sums_cut.n_splits,
        BLOCK_S=tiles.COMBINE_BLOCK_S,
        BLOCK_C=tiles.COMBINE_BLOCK_C,
    )
    dx = torch.empty_like(saved.x)
    dresidual = torch.empty_like(saved.x) if is_bn_join else None
    run(
        batch_norm_backward.input_gradients_kernel,
        (cut.n_row_tiles * cut.n_channel_tiles,),
        dz_ptr=dy if dz is None else dz,
        x_ptr=saved.x,
        mean_ptr=saved.mean,
        rstd_ptr=saved.rstd,
        weight_ptr=saved.weight,
        bias_ptr=saved.bias,
        residual_ptr=saved.residual,
        residual_mean_ptr=saved.residual_mean,
        residual_rstd_ptr=saved.residual_rstd,
        residual_weight_ptr=saved.residual_weight,
        sum_dz_ptr=sums[0],
        sum_dz_xhat_ptr=sums[1],
        sum_dz_rhat_ptr=sums[2] if is_bn_join else None,
        dx_ptr=dx,
        dresidual_ptr=dresidual,
        n_rows=shape.n_rows,
        n_channels=shape.n_channels,
        n_spatial=shape.n_spatial,
        RELU=relu and dz is None,
        TRAINING=training,
        RESIDUAL_TRAINING=residual_training,
        CHANNELS_LAST=shape.channels_last,
        CHANNEL_GROUP=shape.channel_group,
        BLOCK_M=cut.block_m,
        BLOCK_C=cut.block_c,
    )
    if join == "add":
        dresidual = dz
    return Gradients(dx, dweight, dbias, dresidual, dresidual_weight, dresidual_bias)
