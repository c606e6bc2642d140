"""Allocates outputs and partial results, chooses grids and launches the kernels of the batch norm. Imports triton.

Tensors arrive checked: 4-D, on one device, dense, and all image-shaped ones in the layout of x.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from resnet_fast.kernels import batch_norm_backward, batch_norm_forward, tiles

from .arguments import BatchNormArgs, Gradients, Join, Outputs, PartialStatistics, Saved, accumulation_type

# Pixels are counted in 32 bits from the start of a tile's first image (kernels/tile_access.py: tile_offsets).
MAX_NCHW_PIXELS = 2**31 - tiles.TILE_ELEMENTS


class Shape(NamedTuple):
    """A 4-D tensor as the kernels see it: rows, channels and pixels per image, in one of two layouts."""

    n_rows: int
    n_channels: int
    n_spatial: int
    channels_last: bool
    rows_per_group: int  # those of `ghost_batch_size` images, or all

    @classmethod
    def of(cls, x: Tensor, ghost_batch_size: int = 0) -> "Shape":
        n_images, n_channels, height, width = x.shape
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        if not channels_last and height * width > MAX_NCHW_PIXELS:
            raise ValueError(f"an NCHW image must have at most {MAX_NCHW_PIXELS} pixels, got {height}x{width}")
        group_images = ghost_batch_size if 0 < ghost_batch_size < n_images else n_images
        n_spatial = height * width
        return cls(n_images * n_spatial, n_channels, n_spatial, channels_last, group_images * n_spatial)

    @property
    def n_groups(self) -> int:
        return -(-self.n_rows // self.rows_per_group)

    @property
    def sizes(self) -> dict[str, int | None]:
        """As the kernels take them, to which None says that there is one group."""
        return {
            "n_rows": self.n_rows,
            "n_channels": self.n_channels,
            "n_spatial": self.n_spatial,
            "rows_per_group": None if self.n_groups == 1 else self.rows_per_group,
        }

    @property
    def channel_group(self) -> int:
        """Channels to one 16-byte access of a 16-bit type, where there are whole ones."""
        return 8 if self.n_channels % 8 == 0 else 1

    @property
    def relu_mask(self) -> tuple[int, int]:
        """The shape of the ReLU bits, in bytes (kernels/tile_access.py: bit_offsets)."""
        if self.channels_last:
            return self.n_rows, -(-self.n_channels // 8)
        last_rows = self.n_rows - (self.n_groups - 1) * self.rows_per_group
        return self.n_channels, (self.n_groups - 1) * -(-self.rows_per_group // 8) - (-last_rows // 8)


def launch_kernel(kernel, grid: tuple, options: dict[str, Any] | None = None, /, **arguments) -> None:
    """The one place where a kernel is launched; `options` of its compiler instead of `compiler_options`."""
    if options is None:
        options = compiler_options(arguments, is_nvidia=torch.version.cuda is not None)
    kernel[grid](**arguments, **options)


def compiler_options(arguments: dict[str, Any], is_nvidia: bool) -> dict[str, int]:
    """How a kernel with these arguments is compiled."""
    options = {"num_warps": tiles.NUM_WARPS}
    if is_nvidia:
        limit = tiles.MAX_REGISTERS_COMBINE
        if "BLOCK_M" in arguments:
            limit = tiles.max_registers(arguments["CHANNELS_LAST"], arguments["x_ptr"].element_size())
        if limit is not None:
            options["maxnreg"] = limit
    return options


def statistics(
    x: Tensor,
    norm: BatchNormArgs,
    var: Tensor | None = None,
    ghost_batch_size: int = 0,
    partial_statistics: PartialStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """mean and rstd [n_groups, C] of the pass: the batch's (running statistics updated in place), or the tracked ones.

    `var`: [n_groups, C] in fp64, receives the batch's biased variance. `partial_statistics`: the batch's, of one
    group.
    """
    shape = Shape.of(x, ghost_batch_size)
    tiling = tiles.choose_tiles(*shape)
    mean = torch.empty(shape.n_groups, shape.n_channels, dtype=accumulation_type(x), device=x.device)
    rstd = torch.empty_like(mean)
    partial_mean = partial_m2 = None
    rows_per_split, group_splits = tiling.rows_per_split, tiling.group_splits
    if partial_statistics is not None:
        partial_mean, partial_m2 = partial_statistics.partials.unbind()
        rows_per_split, group_splits = partial_statistics.rows_per_part, len(partial_mean)
    elif norm.training:
        partial_mean, partial_m2 = mean.new_empty(2, tiling.n_splits, shape.n_channels).unbind()
        launch_kernel(
            batch_norm_forward.statistics_kernel,
            (tiling.n_splits * tiling.n_channel_tiles,),
            x_ptr=x,
            partial_mean_ptr=partial_mean,
            partial_m2_ptr=partial_m2,
            **shape.sizes,
            rows_per_split=tiling.rows_per_split,
            CHANNELS_LAST=shape.channels_last,
            CHANNEL_GROUP=shape.channel_group,
            BLOCK_M=tiling.block_m,
            BLOCK_C=tiling.block_c,
        )
    launch_kernel(
        batch_norm_forward.combine_statistics_kernel,
        (triton.cdiv(shape.n_channels, tiles.COMBINE_BLOCK_C),),
        x_ptr=x if partial_statistics is None else None,  # for the pivot, which is theirs alone
        partial_mean_ptr=partial_mean,
        partial_m2_ptr=partial_m2,
        running_mean_ptr=norm.running_mean,
        running_var_ptr=norm.running_var,
        mean_ptr=mean,
        rstd_ptr=rstd,
        var_ptr=var,
        **shape.sizes,
        rows_per_split=rows_per_split,
        n_groups=shape.n_groups,
        group_splits=group_splits,
        momentum=norm.momentum,
        eps=norm.eps,
        TRAINING=norm.training,
        CHANNELS_LAST=shape.channels_last,
        BLOCK_S=tiles.COMBINE_BLOCK_S,
        BLOCK_C=tiles.COMBINE_BLOCK_C,
    )
    return mean, rstd


def forward(
    x: Tensor,
    norm: BatchNormArgs,
    residual: Tensor | None,
    residual_norm: BatchNormArgs | None,
    relu: bool,
    ghost_batch_size: int = 0,
    reverse: bool = False,
    partial_statistics: PartialStatistics | None = None,
) -> Outputs:
    """relu(bn(x) + residual); ReLU's bits are written where there is a residual.

    `ghost_batch_size`: here and below, images per group of batch statistics; 0 for all. `reverse`: whether the second
    pass walks from the last tile to the first. `partial_statistics`: of x, if they need no pass.
    """
    mean, rstd = statistics(x, norm, ghost_batch_size=ghost_batch_size, partial_statistics=partial_statistics)
    residual_mean = residual_rstd = None
    if residual is not None and residual_norm is not None:
        residual_mean, residual_rstd = statistics(residual, residual_norm, ghost_batch_size=ghost_batch_size)
    residual_arguments = (residual, residual_norm, residual_mean, residual_rstd)
    return normalize(x, norm, mean, rstd, *residual_arguments, relu, ghost_batch_size, reverse)


def normalize(
    x: Tensor,
    norm: BatchNormArgs,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    residual_norm: BatchNormArgs | None,
    residual_mean: Tensor | None,
    residual_rstd: Tensor | None,
    relu: bool,
    ghost_batch_size: int = 0,
    reverse: bool = False,
) -> Outputs:
    """`forward` behind the statistics."""
    shape = Shape.of(x, ghost_batch_size)
    tiling = tiles.choose_tiles(*shape)
    y = torch.empty_like(x)
    relu_mask = None
    if relu and residual is not None:
        relu_mask = torch.empty(shape.relu_mask, dtype=torch.uint8, device=x.device)
    launch_kernel(
        batch_norm_forward.normalize_kernel,
        (tiling.n_row_tiles * tiling.n_channel_tiles,),
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
        **shape.sizes,
        RELU=relu,
        REVERSED=reverse,
        CHANNELS_LAST=shape.channels_last,
        CHANNEL_GROUP=shape.channel_group,
        BLOCK_M=tiling.block_m,
        BLOCK_C=tiling.block_c,
    )
    return Outputs(y, relu_mask, mean, rstd, residual_mean, residual_rstd)


def backward(
    dy: Tensor,
    dy_alias: Tensor | None,
    saved: Saved,
    join: Join,
    relu: bool,
    training: bool,
    residual_training: bool,
    ghost_batch_size: int = 0,
    reverse: bool = False,
) -> Gradients:
    """Gradients of relu(bn(x) + residual): one pass for the sums, one for dx (and the bn join's dresidual)."""
    dz, sums, (dweight, dbias, dresidual_weight, dresidual_bias) = gradient_sums(
        dy, dy_alias, saved, join, relu, ghost_batch_size
    )
    dx, dresidual = input_gradients(
        dy, dz, sums, saved, join, relu, training, residual_training, ghost_batch_size, reverse
    )
    return Gradients(dx, dweight, dbias, dresidual, dresidual_weight, dresidual_bias)


def gradient_sums(
    dy: Tensor, dy_alias: Tensor | None, saved: Saved, join: Join, relu: bool, ghost_batch_size: int = 0
) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
    """dz where the second pass reads it, the sums of dz, dz·x̂ and (bn join) the residual's, [2 or 3, n_groups, C], and
    the gradients of weight, bias, residual weight and residual bias.
    """
    shape = Shape.of(saved.x, ghost_batch_size)
    tiling = tiles.choose_tiles(*shape, tiles.SMALL_TILE_ELEMENTS)
    # Behind a mask or a fork the second pass would read more than dz; else it reads dy and recomputes ReLU from x.
    writes_dz = saved.relu_mask is not None or dy_alias is not None
    dz = torch.empty_like(saved.x) if writes_dz else None
    is_bn_join = join == "bn"
    partials = saved.mean.new_empty(3 if is_bn_join else 2, tiling.n_splits, shape.n_channels)
    launch_kernel(
        batch_norm_backward.reduce_kernel,
        (tiling.n_splits * tiling.n_channel_tiles,),
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
        **shape.sizes,
        rows_per_split=tiling.rows_per_split,
        RELU=relu,
        CHANNELS_LAST=shape.channels_last,
        CHANNEL_GROUP=shape.channel_group,
        BLOCK_M=tiling.block_m,
        BLOCK_C=tiling.block_c,
    )
    gradients = empty_gradients(saved)
    sums = combine_gradients(partials, shape.n_groups, tiling.group_splits, gradients)
    return dz, sums, gradients


def empty_gradients(saved: Saved) -> list[Tensor | None]:
    """For those of weight, bias, residual weight and residual bias, [C], where there are such."""
    parameters = (saved.weight, saved.bias, saved.residual_weight, saved.residual_bias)
    return [None if parameter is None else torch.empty_like(parameter) for parameter in parameters]


def combine_gradients(
    partials: Tensor, n_groups: int, group_splits: int, gradients: Sequence[Tensor | None] = (None,) * 4
) -> Tensor:
    """The sums of every group, [2 or 3, n_groups, C], from the partial ones, [2 or 3, n_splits, C].

    `gradients`: of weight, bias, residual weight and residual bias, [C], where they are wanted.
    """
    n_sums, n_splits, n_channels = partials.shape
    sums = partials.new_empty(n_sums, n_groups, n_channels)
    has_residual = n_sums == 3
    launch_kernel(
        batch_norm_backward.combine_gradients_kernel,
        (triton.cdiv(n_channels, tiles.COMBINE_BLOCK_C),),
        partial_dz_ptr=partials[0],
        partial_dz_xhat_ptr=partials[1],
        partial_dz_rhat_ptr=partials[2] if has_residual else None,
        sum_dz_ptr=sums[0],
        sum_dz_xhat_ptr=sums[1],
        sum_dz_rhat_ptr=sums[2] if has_residual else None,
        dweight_ptr=gradients[0],
        dbias_ptr=gradients[1],
        dresidual_weight_ptr=gradients[2],
        dresidual_bias_ptr=gradients[3],
        n_channels=n_channels,
        n_groups=n_groups,
        group_splits=group_splits,
        n_splits=n_splits,
        BLOCK_S=tiles.COMBINE_BLOCK_S,
        BLOCK_C=tiles.COMBINE_BLOCK_C,
    )
    return sums


def input_gradients(
    dy: Tensor,
    dz: Tensor | None,
    sums: Tensor,
    saved: Saved,
    join: Join,
    relu: bool,
    training: bool,
    residual_training: bool,
    ghost_batch_size: int = 0,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dx and dresidual from the `sums` of every group."""
    shape = Shape.of(saved.x, ghost_batch_size)
    tiling = tiles.choose_tiles(*shape)
    is_bn_join = join == "bn"
    dx = torch.empty_like(saved.x)
    dresidual = torch.empty_like(saved.x) if is_bn_join else None
    launch_kernel(
        batch_norm_backward.input_gradients_kernel,
        (tiling.n_row_tiles * tiling.n_channel_tiles,),
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
        **shape.sizes,
        RELU=relu and dz is None,
        TRAINING=training,
        RESIDUAL_TRAINING=residual_training,
        REVERSED=reverse,
        CHANNELS_LAST=shape.channels_last,
        CHANNEL_GROUP=shape.channel_group,
        BLOCK_M=tiling.block_m,
        BLOCK_C=tiling.block_c,
    )
    return dx, dz if join == "add" else dresidual
