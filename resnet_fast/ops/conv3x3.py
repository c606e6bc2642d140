"""Launches of the 3x3 convolution and its data gradient (kernels/conv3x3.py). Imports triton.

Callers (pairs.py) have checked the tensors: [N, C, H, W] in channels_last, on one device, of one type.
"""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fast.kernels import conv3x3, tiles
from resnet_fast.kernels.conv_tiles import ConvTiles, shared_bytes

from . import launch
from .arguments import Gradients, PartialStatistics, Saved


def fits(tiling: ConvTiles, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a program fits in a multiprocessor's shared memory; the interpreter has no limit."""
    if device.type != "cuda":
        return True
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return shared_bytes(tiling, dtype.itemsize) <= limit


def is_pipelined(device: torch.device) -> bool:
    """Return whether blocks are loaded while others are multiplied, which needs TMA (sm_90 and newer).

    Without TMA, descriptors become addresses, and Triton loads blocks of 16-bit types one after the other.
    """
    return device.type != "cuda" or (launch.nvidia_capability(device) or 0) >= 90


def box(x: Tensor, n_pixels: int, n_channels: int) -> TensorDescriptor:
    """View x: [N, C, H, W] as [N, H, W, C]; a block is `n_pixels` pixels, in whole lines, by `n_channels` channels."""
    width = x.shape[3]
    n_lines = min(n_pixels // width, width)
    pixels, n_x = x.permute(0, 2, 3, 1), x.shape[1]
    strides = [width * width * n_x, width * n_x, n_x, 1]  # x's own may differ if N is 1
    return TensorDescriptor(
        pixels, list(pixels.shape), strides, [n_pixels // (n_lines * width), n_lines, width, n_channels]
    )


def rows(x: Tensor, n_pixels: int, n_channels: int) -> TensorDescriptor:
    """View x: [N, C, H, W] as [N·H·W, C]."""
    return TensorDescriptor.from_tensor(x.permute(0, 2, 3, 1).flatten(0, 2), [n_pixels, n_channels])


def taps(weight: Tensor, block: list[int]) -> TensorDescriptor:
    """View weight: [C_out, C_in, 3, 3], channels_last, as [C_out, 9·C_in]."""
    return TensorDescriptor.from_tensor(weight.permute(0, 2, 3, 1).flatten(1), block)


def parts_of(x: Tensor, tiling: ConvTiles) -> tuple[int, int, int]:
    """Return the number of rows of x, of rows per part, and of parts."""
    n_rows = x.shape[0] * x.shape[2] * x.shape[3]
    rows_per_part = tiling.block_m * tiling.per_program
    return n_rows, rows_per_part, -(-n_rows // rows_per_part)


def launch_kernel(kernel, tiling: ConvTiles, x: Tensor, out: Tensor, **arguments) -> None:
    """Launch a convolution of x: [N, C, H, W] that writes `out`."""
    n_rows, rows_per_program, n_parts = parts_of(x, tiling)
    n_channels = out.shape[1]
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    if tiling.max_registers and launch.nvidia_capability(x.device) is not None:
        options["maxnreg"] = tiling.max_registers
    launch.launch_kernel(
        kernel,
        (n_parts * triton.cdiv(n_channels, tiling.block_n),),
        options,
        **arguments,
        n_rows=n_rows,
        rows_per_program=rows_per_program,
        SUMMED_CHANNELS=x.shape[1],
        WIDTH=x.shape[3],
        TILE=tiles.Tile.of(n_channels, True, tiling.block_m, tiling.block_n),
        BLOCK_K=tiling.block_k,
    )


def forward(x: Tensor, weight: Tensor, tiling: ConvTiles) -> tuple[Tensor, PartialStatistics]:
    """Convolve x: [N, C_in, H, W] with weight: [C_out, C_in, 3, 3]; return the result and its partial statistics."""
    _, rows_per_part, n_parts = parts_of(x, tiling)
    y = empty_output(x, len(weight))
    partials = torch.empty(1 + n_parts, len(weight), 2, dtype=torch.float32, device=x.device)
    launch_kernel(
        conv3x3.conv3x3_kernel,
        tiling,
        x,
        y,
        x_desc=box(x, tiling.block_m, tiling.block_k),
        weight_desc=taps(weight, [tiling.block_n, tiling.block_k]),
        y_desc=rows(y, tiling.block_m, tiling.block_n),
        partials_ptr=partials,
    )
    return y, PartialStatistics(partials, rows_per_part)


def data_gradient(
    dout: Tensor, conv_weight: Tensor, tiling: ConvTiles, saved: Saved, dy_alias: Tensor | None
) -> tuple[Tensor, Tensor, Gradients]:
    """Return dz, its sums, [2 or 3, 1, C_in], and the vectors' gradients of the batch norm that saved `saved`.

    Its output y = relu(bn(x) + residual) is the convolution's input. `dy_alias` is the gradient of y's other consumer.
    """
    _, _, n_parts = parts_of(dout, tiling)
    n_channels = conv_weight.shape[1]
    dz = empty_output(dout, n_channels)
    partials = saved.mean.new_empty(2 if saved.residual is None else 3, n_parts, n_channels)
    kernel = conv3x3.conv3x3_data_gradient_kernel
    launch_kernel(
        kernel,
        tiling,
        dout,
        dz,
        dout_desc=box(dout, tiling.block_m, tiling.block_k),
        conv_weight_desc=taps(conv_weight, [tiling.block_k, tiling.block_n]),
        dy_alias_ptr=dy_alias,
        **launch.pointers(kernel, saved),
        dz_desc=rows(dz, tiling.block_m, tiling.block_n),
        partials_ptr=partials,
    )
    return dz, *launch.combine_gradients(partials, 1, n_parts, saved)


def empty_output(x: Tensor, n_channels: int) -> Tensor:
    n_images, _, height, width = x.shape
    shape = (n_images, n_channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
