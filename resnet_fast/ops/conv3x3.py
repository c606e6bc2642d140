"""Launches of the 3x3 convolution and its data gradient (kernels/conv3x3.py). Imports triton.

Tensors arrive checked (pairs.py): [N, C, H, W] in channels_last, on one device, in one type.
"""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fast.kernels import conv3x3, tiles
from resnet_fast.kernels.conv_tiles import ConvTiles, shared_bytes

from . import launch
from .arguments import PartialStatistics, Saved


def fits(tiling: ConvTiles, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a multiprocessor has the shared memory that a program takes; in the interpreter there is no limit."""
    if device.type != "cuda":
        return True
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return shared_bytes(tiling, dtype.itemsize) <= limit


def is_pipelined(device: torch.device) -> bool:
    """Whether blocks are loaded while others are multiplied: by TMA, since sm_90. Without it descriptors become
    addresses, and Triton loads blocks of 16-bit types one after the other.
    """
    return device.type != "cuda" or (launch.nvidia_capability(device) or 0) >= 90


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


def compiler_options(tiling: ConvTiles, device: torch.device) -> dict[str, int]:
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    if tiling.max_registers and launch.nvidia_capability(device) is not None:
        options["maxnreg"] = tiling.max_registers
    return options


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
        compiler_options(tiling, x.device),
        x_desc=box(x, tiling.block_m, tiling.block_k),
        weight_desc=taps(weight, [tiling.block_n, tiling.block_k]),
        y_desc=rows(y, tiling.block_m, tiling.block_n),
        partials_ptr=partials,
        n_rows=n_rows,
        rows_per_program=rows_per_program,
        SUMMED_CHANNELS=n_summed_channels,
        WIDTH=width,
        TILE=tiles.Tile.of(n_channels, True, tiling.block_m, tiling.block_n),
        BLOCK_K=tiling.block_k,
    )
    return y, PartialStatistics(partials, rows_per_program)


def data_gradient(
    dout: Tensor, conv_weight: Tensor, tiling: ConvTiles, saved: Saved, dy_alias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dz, and its sums as `launch.gradient_sums` returns them, [2 or 3, 1, C_in], of the batch norm that saved `saved`.

    Its output y, relu(bn(x) + residual), is the convolution's input; `dy_alias` is the gradient of y's other consumer.
    """
    n_images, n_summed_channels, height, width = dout.shape
    n_channels = conv_weight.shape[1]
    n_rows, rows_per_program, n_parts = parts_of(dout, tiling.block_m, tiling.per_program)
    shape = (n_images, n_channels, height, width)
    dz = torch.empty(shape, dtype=dout.dtype, device=dout.device, memory_format=torch.channels_last)
    partials = saved.mean.new_empty(2 if saved.residual is None else 3, n_parts, n_channels)
    kernel = conv3x3.conv3x3_data_gradient_kernel
    launch.launch_kernel(
        kernel,
        (n_parts * triton.cdiv(n_channels, tiling.block_n),),
        compiler_options(tiling, dout.device),
        dout_desc=box(dout, tiling.block_m, tiling.block_k),
        conv_weight_desc=taps(conv_weight, [tiling.block_k, tiling.block_n]),
        dy_alias_ptr=dy_alias,
        **launch.pointers(kernel, saved),
        dz_desc=rows(dz, tiling.block_m, tiling.block_n),
        partials_ptr=partials,
        n_rows=n_rows,
        rows_per_program=rows_per_program,
        SUMMED_CHANNELS=n_summed_channels,
        WIDTH=width,
        TILE=tiles.Tile.of(n_channels, True, tiling.block_m, tiling.block_n),
        BLOCK_K=tiling.block_k,
    )
    return dz, launch.combine_gradients(partials, 1, n_parts)
