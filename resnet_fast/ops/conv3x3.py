"""Launches of the 3x3 convolution and its gradients (kernels/conv3x3.py). Imports triton.

Tensors arrive checked (convolution.py): [N, C, H, W] in channels_last, on one device, in one type.
"""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fast.kernels import conv3x3, tiles
from resnet_fast.kernels.conv_tiles import COMBINE_BLOCK, ConvTiles

from . import launch
from .arguments import PartialStatistics, Saved


def box(x: Tensor, n_pixels: int, n_channels: int) -> TensorDescriptor:
    """x: [N, C, H, W] as [N, H, W, C], of which a block is `n_pixels` pixels, whole lines, by `n_channels` channels."""
    width = x.shape[3]
    n_lines = min(n_pixels // width, width)
    pixels, n_x = x.permute(0, 2, 3, 1), x.shape[1]
    strides = [width * width * n_x, width * n_x, n_x, 1]  # of one image, x may have others
    return TensorDescriptor(
        pixels, list(pixels.shape), strides, [n_pixels // (n_lines * width), n_lines, width, n_channels]
    )


def rows(x: Tensor, n_pixels: int, n_channels: int) -> TensorDescriptor:
    """x: [N, C, H, W] as [N·H·W, C]."""
    return TensorDescriptor.from_tensor(x.permute(0, 2, 3, 1).flatten(0, 2), [n_pixels, n_channels])


def taps(weight: Tensor, block: list[int]) -> TensorDescriptor:
    """weight: [C_out, C_in, 3, 3] in channels_last as [C_out, 9·C_in]."""
    return TensorDescriptor.from_tensor(weight.permute(0, 2, 3, 1).flatten(1), block)


def parts_of(x: Tensor, rows_per_block: int, blocks_per_part: int) -> tuple[int, int, int]:
    """Rows of x, rows of a part, and how many parts there are."""
    n_rows = x.shape[0] * x.shape[2] * x.shape[3]
    rows_per_part = rows_per_block * blocks_per_part
    return n_rows, rows_per_part, -(-n_rows // rows_per_part)


def forward(x: Tensor, weight: Tensor, tiling: ConvTiles) -> tuple[Tensor, PartialStatistics]:
    """The convolution of x: [N, C_in, H, W] with weight: [C_out, C_in, 3, 3], and its result's statistics, in parts."""
    n_images, n_summed_channels, height, width = x.shape
    n_channels = weight.shape[0]
    n_rows, rows_per_program, n_parts = parts_of(x, tiling.block_m, tiling.per_program)
    shape = (n_images, n_channels, height, width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    partials = torch.empty(1 + n_parts, n_channels, 2, dtype=torch.float32, device=x.device)
    launch.launch_kernel(
        conv3x3.conv3x3_kernel,
        (n_parts * triton.cdiv(n_channels, tiling.block_n),),
        tiling.options,
        x_desc=box(x, tiling.block_m, tiling.block_k),
        weight_desc=taps(weight, [tiling.block_n, tiling.block_k]),
        y_desc=rows(y, tiling.block_m, tiling.block_n),
        partials_ptr=partials,
        n_rows=n_rows,
        rows_per_program=rows_per_program,
        CHANNELS_AS_ROWS=tiling.channels_as_rows,
        SUMMED_CHANNELS=n_summed_channels,
        WIDTH=width,
        TILE=tiles.Tile.of(n_channels, True, tiling.block_m, tiling.block_n),
        BLOCK_K=tiling.block_k,
    )
    return y, PartialStatistics(partials, rows_per_program)


def data_gradient(
    dy: Tensor,
    weight: Tensor,
    tiling: ConvTiles,
    saved: Saved | None = None,
    relu: bool = False,
    dx_alias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the convolution's input, and `dx_alias`, that of the input's other consumer, added to it.

    With `saved`, of the batch norm whose output the input is (`relu`: it ends in ReLU), the first result is that batch
    norm's dz, and the second its sums as `launch.gradient_sums` returns them, [2 or 3, 1, C_in]. Without, which only
    tests and benchmarks do, there are none.
    """
    n_images, n_summed_channels, height, width = dy.shape
    n_channels = weight.shape[1]
    n_rows, rows_per_program, n_parts = parts_of(dy, tiling.block_m, tiling.per_program)
    shape = (n_images, n_channels, height, width)
    dx = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    # All that is saved but for the last two, the residual's weight and bias.
    norm_pointers = {f"{name}_ptr": saved and getattr(saved, name) for name in Saved._fields[:-2]}
    partials = None
    if saved is not None:
        partials = saved.mean.new_empty(2 if saved.residual is None else 3, n_parts, n_channels)
    launch.launch_kernel(
        conv3x3.conv3x3_data_gradient_kernel,
        (n_parts * triton.cdiv(n_channels, tiling.block_n),),
        tiling.options,
        dy_desc=box(dy, tiling.block_m, tiling.block_k),
        conv_weight_desc=taps(weight, [tiling.block_k, tiling.block_n]),
        dx_alias_ptr=dx_alias,
        **norm_pointers,
        dx_desc=rows(dx, tiling.block_m, tiling.block_n),
        partials_ptr=partials,
        n_rows=n_rows,
        rows_per_program=rows_per_program,
        RELU=relu,
        CHANNELS_AS_ROWS=tiling.channels_as_rows,
        SUMMED_CHANNELS=n_summed_channels,
        WIDTH=width,
        TILE=tiles.Tile.of(n_channels, True, tiling.block_m, tiling.block_n),
        BLOCK_K=tiling.block_k,
    )
    return dx, None if partials is None else launch.combine_gradients(partials, 1, n_parts)


def weight_gradient(x: Tensor, dy: Tensor, tiling: ConvTiles, dtype: torch.dtype) -> Tensor:
    """The gradient of the weight, [C_out, C_in, 3, 3] in `dtype` and channels_last: summed in fp32, rounded once."""
    n_in_channels, width = x.shape[1], x.shape[3]
    n_out_channels = dy.shape[1]
    n_rows, rows_per_part, n_parts = parts_of(x, tiling.block_k, tiling.per_program)
    shape = (n_out_channels, n_in_channels, 3, 3)
    dweight = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    partials = dweight
    if n_parts > 1:
        partials = torch.empty(n_parts, *shape, dtype=torch.float32, device=x.device)
    n_tiles = triton.cdiv(n_out_channels, tiling.block_m) * triton.cdiv(n_in_channels, tiling.block_n)
    launch.launch_kernel(
        conv3x3.conv3x3_weight_gradient_kernel,
        (n_parts * n_tiles * 9,),
        tiling.options,
        dy_desc=rows(dy, tiling.block_k, tiling.block_m),
        x_desc=box(x, tiling.block_k, tiling.block_n),
        partial_ptr=partials,
        n_rows=n_rows,
        n_in_channels=n_in_channels,
        n_out_channels=n_out_channels,
        rows_per_part=rows_per_part,
        WIDTH=width,
        **tiling.blocks,
    )
    if n_parts > 1:
        launch.launch_kernel(
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
