"""Launches of the 3x3 convolution and its gradients (kernels/conv3x3.py). Imports triton.

Tensors arrive checked (convolution.py): [N, C, H, W] in channels_last, on one device, in one type.
"""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fast.kernels import batch_norm_backward, conv3x3, tiles
from resnet_fast.kernels.conv_tiles import COMBINE_BLOCK, ConvTiles

from .arguments import PartialStatistics, Saved
from .launch import run


def box(x: Tensor, n_pixels: int, n_channels: int) -> TensorDescriptor:
    """x: [N, C, H, W] as [N, H, W, C], of which a block is `n_pixels` pixels, whole lines, by `n_channels` channels."""
    width = x.shape[3]
    n_lines = min(n_pixels // width, width)
    pixels = x.permute(0, 2, 3, 1)
    return TensorDescriptor.from_tensor(pixels, [n_pixels // (n_lines * width), n_lines, width, n_channels])


def rows(x: Tensor, n_pixels: int, n_channels: int) -> TensorDescriptor:
    """x: [N, C, H, W] as [N·H·W, C]."""
    return TensorDescriptor.from_tensor(x.permute(0, 2, 3, 1).flatten(0, 2), [n_pixels, n_channels])


def taps(weight: Tensor, block: list[int]) -> TensorDescriptor:
    """weight: [C_out, C_in, 3, 3] in channels_last as [C_out, 9, C_in]."""
    return TensorDescriptor.from_tensor(weight.permute(0, 2, 3, 1).flatten(1, 2), block)


def cut(x: Tensor, rows_per_block: int, blocks_per_part: int) -> tuple[int, int, int]:
    """Rows of x, rows of a part, and how many parts there are."""
    n_rows = x.shape[0] * x.shape[2] * x.shape[3]
    rows_per_part = rows_per_block * blocks_per_part
    return n_rows, rows_per_part, -(-n_rows // rows_per_part)


def forward(x: Tensor, weight: Tensor, of: ConvTiles) -> tuple[Tensor, PartialStatistics]:
    """The convolution of x: [N, C_in, H, W] with weight: [C_out, C_in, 3, 3], and its result's statistics, in parts."""
    n_images, n_in_channels, height, width = x.shape
    n_out_channels = weight.shape[0]
    n_rows, rows_per_program, n_parts = cut(x, of.block_m, of.per_program)
    shape = (n_images, n_out_channels, height, width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    partials = torch.empty(2, n_parts, n_out_channels, dtype=torch.float32, device=x.device)
    run(
        conv3x3.conv3x3_kernel,
        (n_parts * triton.cdiv(n_out_channels, of.block_n),),
        of.options,
        x_desc=box(x, of.block_m, of.block_k),
        weight_desc=taps(weight, [of.block_n, 1, of.block_k]),
        y_desc=rows(y, of.block_m, of.block_n),
        partial_mean_ptr=partials[0],
        partial_m2_ptr=partials[1],
        n_rows=n_rows,
        n_in_channels=n_in_channels,
        n_out_channels=n_out_channels,
        rows_per_program=rows_per_program,
        CHANNELS_AS_ROWS=of.channels_as_rows,
        WIDTH=width,
        BLOCK_M=of.block_m,
        BLOCK_N=of.block_n,
        BLOCK_K=of.block_k,
    )
    return y, PartialStatistics(partials, rows_per_program)


def data_gradient(
    dy: Tensor,
    weight: Tensor,
    of: ConvTiles,
    saved: Saved | None = None,
    relu: bool = False,
    dx_alias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the convolution's input, and `dx_alias`, that of the input's other consumer, added to it.

    With `saved`, of the batch norm whose output the input is (`relu`: it ends in ReLU), the first result is that batch
    norm's dz, and the second its sums as `launch.gradient_sums` returns them, [2 or 3, 1, C_in].
    """
    n_images, n_in_channels, height, width = dy.shape
    n_out_channels = weight.shape[1]
    n_rows, rows_per_program, n_parts = cut(dy, of.block_m, of.per_program)
    shape = (n_images, n_out_channels, height, width)
    dx = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    is_bn_join = saved is not None and saved.residual is not None
    partials: list[Tensor | None] = [None] * 3
    sums = None
    if saved is not None:
        of_norm = saved.mean.new_empty(3 if is_bn_join else 2, n_parts, n_out_channels)
        sums = of_norm.new_empty(len(of_norm), 1, n_out_channels)
        partials = [*of_norm.unbind(), None][:3]
    run(
        conv3x3.conv3x3_data_gradient_kernel,
        (n_parts * triton.cdiv(n_out_channels, of.block_n),),
        of.options,
        dy_desc=box(dy, of.block_m, of.block_k),
        weight_desc=taps(weight, [of.block_k, 1, of.block_n]),
        dx_alias_ptr=dx_alias,
        relu_mask_ptr=saved and saved.relu_mask,
        x_ptr=saved and saved.x,
        mean_ptr=saved and saved.mean,
        rstd_ptr=saved and saved.rstd,
        weight_ptr=saved and saved.weight,
        bias_ptr=saved and saved.bias,
        residual_ptr=saved and saved.residual,
        residual_mean_ptr=saved and saved.residual_mean,
        residual_rstd_ptr=saved and saved.residual_rstd,
        dx_desc=rows(dx, of.block_m, of.block_n),
        partial_dz_ptr=partials[0],
        partial_dz_xhat_ptr=partials[1],
        partial_dz_rhat_ptr=partials[2],
        n_rows=n_rows,
        n_in_channels=n_in_channels,
        n_out_channels=n_out_channels,
        rows_per_program=rows_per_program,
        RELU=relu,
        CHANNELS_AS_ROWS=of.channels_as_rows,
        WIDTH=width,
        BLOCK_M=of.block_m,
        BLOCK_N=of.block_n,
        BLOCK_K=of.block_k,
    )
    if sums is not None:
        run(
            batch_norm_backward.combine_gradients_kernel,
            (triton.cdiv(n_out_channels, tiles.COMBINE_BLOCK_C),),
            partial_dz_ptr=partials[0],
            partial_dz_xhat_ptr=partials[1],
            partial_dz_rhat_ptr=partials[2],
            sum_dz_ptr=sums[0],
            sum_dz_xhat_ptr=sums[1],
            sum_dz_rhat_ptr=sums[2] if is_bn_join else None,
            dweight_ptr=None,
            dbias_ptr=None,
            dresidual_weight_ptr=None,
            dresidual_bias_ptr=None,
            n_channels=n_out_channels,
            n_groups=1,
            group_splits=n_parts,
            n_splits=n_parts,
            BLOCK_S=tiles.COMBINE_BLOCK_S,
            BLOCK_C=tiles.COMBINE_BLOCK_C,
        )
    return dx, sums


def weight_gradient(x: Tensor, dy: Tensor, of: ConvTiles, dtype: torch.dtype) -> Tensor:
    """The gradient of the weight, [C_out, C_in, 3, 3] in `dtype` and channels_last: summed in fp32, rounded once."""
    n_in_channels, width = x.shape[1], x.shape[3]
    n_out_channels = dy.shape[1]
    n_rows, rows_per_part, n_parts = cut(x, of.block_k, of.per_program)
    shape = (n_out_channels, n_in_channels, 3, 3)
    dweight = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    partials = dweight
    if n_parts > 1:
        partials = torch.empty(n_parts, *shape, dtype=torch.float32, device=x.device)
    n_tiles = triton.cdiv(n_out_channels, of.block_m) * triton.cdiv(n_in_channels, of.block_n)
    run(
        conv3x3.conv3x3_weight_gradient_kernel,
        (n_parts * n_tiles * 9,),
        of.options,
        dy_desc=rows(dy, of.block_k, of.block_m),
        x_desc=box(x, of.block_k, of.block_n),
        partial_ptr=partials,
        n_rows=n_rows,
        n_in_channels=n_in_channels,
        n_out_channels=n_out_channels,
        rows_per_part=rows_per_part,
        CHANNELS_AS_ROWS=of.channels_as_rows,
        WIDTH=width,
        BLOCK_M=of.block_m,
        BLOCK_N=of.block_n,
        BLOCK_K=of.block_k,
    )
    if n_parts > 1:
        run(
            conv3x3.combine_weight_gradient_kernel,
            (triton.cdiv(dweight.numel(), COMBINE_BLOCK),),
            {"num_warps": tiles.NUM_WARPS},
            partial_ptr=partials,
            dweight_ptr=dweight,
            n_elements=dweight.numel(),
            n_parts=n_parts,
            BLOCK=COMBINE_BLOCK,
        )
    return dweight
