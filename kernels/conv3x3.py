"""3x3 convolution, stride 1, padding 1, with a batch norm's sums in its epilogue. Equations: README.md in this folder.

Images are [N, H, W, C] in memory (channels_last). Maps are square and their width is a power of two, so a tile of
consecutive pixels is a box: whole lines of one image, or several whole images. A tensor descriptor loads the box
shifted by a tap, and fills pixels outside the image with zeros, which is the padding. weight is [C_out, 9, C_in] in
memory. Products accumulate in fp32, and the sum is rounded once.
"""

import triton
import triton.language as tl

from .batch_norm_backward import preactivation_gradient, x_hat
from .batch_norm_forward import UNIT, in_units, is_finite, store_pair
from .tile_access import channels_of, load_bits, load_channel, load_tile, part_of_program, wide


@triton.jit
def box_of(first_row, WIDTH: tl.constexpr):
    """Return the image and the line of a box's first row."""
    return first_row // (WIDTH * WIDTH), first_row // WIDTH % WIDTH


@triton.jit
def convolve(
    x_desc,
    weight_desc,
    first_row,
    first_channel,
    BACKWARD: tl.constexpr,
    SUMMED_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return [BLOCK_M, BLOCK_C] in fp32: nine shifted matrix products (C1), or those of the data gradient (C2).

    The rows of the matrix products are channels, and their columns pixels. `weight_desc` has two axes: without a
    reshape, its block goes to the matrix unit from shared memory, not through registers. If the last block of a tap
    reaches into the next tap, x is zero there.
    """
    image, line = box_of(first_row, WIDTH)
    N_BLOCKS: tl.constexpr = (SUMMED_CHANNELS + BLOCK_K - 1) // BLOCK_K
    total = tl.zeros([TILE.block_c, TILE.block_m], tl.float32)
    for step in range(0, 9 * N_BLOCKS):
        tap = step // N_BLOCKS
        channel = step % N_BLOCKS * BLOCK_K
        x = x_desc.load([image, line + tap // 3 - 1, tap % 3 - 1, channel])
        x = tl.reshape(x, [TILE.block_m, BLOCK_K])
        if BACKWARD:
            weight = tl.trans(weight_desc.load([channel, (8 - tap) * TILE.n_channels + first_channel]))
        else:
            weight = weight_desc.load([first_channel, tap * SUMMED_CHANNELS + channel])
        total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
    return tl.trans(total)


@triton.jit
def merged_with_tile(y, valid, count, n_own, mean, m2, unit):
    """Return mean, and M2 in units of 1/unit², of the `count` rows so far and the tile's `n_own` rows together."""
    share = n_own / (count + n_own)
    x = tl.where(valid, y * unit, 0.0)
    tile_mean = tl.sum(x, axis=0) / n_own
    deviation = tl.where(valid, x - tile_mean[None, :], 0.0)
    delta = tile_mean - mean * unit
    merged_m2 = in_units(m2, unit) + tl.sum(deviation * deviation, axis=0) + delta * delta * (count * share)
    return mean + tl.where(is_finite(mean), delta * share, tile_mean) / unit, merged_m2


@triton.jit
def merge_tile(y, first_row, start, end, mean, m2, BLOCK_M: tl.constexpr):
    """Return mean and M2, [BLOCK_C], of the rows from `start` to the end of the tile y, [BLOCK_M, BLOCK_C] in fp32.

    A negative M2 stands for its magnitude in units of 1/UNIT², as in `statistics_kernel`.
    """
    valid = (first_row + tl.arange(0, BLOCK_M) < end)[:, None]
    count = (first_row - start).to(tl.float32)
    n_own = tl.minimum(end - first_row, BLOCK_M).to(tl.float32)
    new_mean, new_m2 = merged_with_tile(y, valid, count, n_own, mean, m2, 1.0)
    not_finite = is_finite(new_m2) == 0  # a square overflows, or y holds Inf or NaN
    if tl.max(not_finite.to(tl.int32), axis=0) > 0:
        rescued_mean, rescued_m2 = merged_with_tile(y, valid, count, n_own, mean, m2, UNIT)
        new_mean = tl.where(not_finite, rescued_mean, new_mean)
        new_m2 = tl.where(not_finite, -rescued_m2, new_m2)
    return new_mean, new_m2


@triton.jit
def conv3x3_kernel(
    x_desc,
    weight_desc,
    y_desc,
    partials_ptr,
    n_rows,
    rows_per_program,
    SUMMED_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute y, and mean and centered M2 of its rounded values over each program's rows; the pivot is 0."""
    part, channel_tile = part_of_program(TILE)
    offs_c, mask_c = channels_of(channel_tile, TILE.n_channels, TILE.block_c)
    first_channel = channel_tile * TILE.block_c
    start = part * rows_per_program
    end = tl.minimum(start + rows_per_program, n_rows)
    mean = tl.zeros([TILE.block_c], tl.float32)
    m2 = tl.zeros([TILE.block_c], tl.float32)
    for first_row in range(start, end, TILE.block_m):
        at = (first_row, first_channel)
        y = convolve(x_desc, weight_desc, *at, False, SUMMED_CHANNELS, WIDTH, TILE, BLOCK_K)
        y = y.to(y_desc.dtype)
        y_desc.store([first_row, first_channel], y)
        mean, m2 = merge_tile(y.to(tl.float32), first_row, start, end, mean, m2, TILE.block_m)

    zero = tl.zeros([TILE.block_c], tl.float32)
    store_pair(partials_ptr + 2 * offs_c, zero, zero, mask_c & (part == 0))
    store_pair(partials_ptr + 2 * (wide(1 + part) * TILE.n_channels + offs_c), mean, m2, mask_c)


@triton.jit
def conv3x3_data_gradient_kernel(
    dout_desc,
    conv_weight_desc,
    dy_alias_ptr,
    relu_mask_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    residual_mean_ptr,
    residual_rstd_ptr,
    dz_desc,
    partials_ptr,
    n_rows,
    rows_per_program,
    SUMMED_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute dz of the batch norm before the convolution, and its sums over each program's rows (B1, B2).

    The convolution's input is y = relu(bn(x) + residual). Its gradient (C2, summed over the convolution's output
    channels) plus the gradient of y's other consumer (the fork) gives dz, as in `reduce_kernel`.
    """
    FORK: tl.constexpr = dy_alias_ptr is not None
    BITS: tl.constexpr = relu_mask_ptr is not None
    part, channel_tile = part_of_program(TILE)
    offs_c, mask_c = channels_of(channel_tile, TILE.n_channels, TILE.block_c)
    first_channel = channel_tile * TILE.block_c
    start = part * rows_per_program
    end = tl.minimum(start + rows_per_program, n_rows)
    sum_dz = tl.zeros([TILE.block_c], tl.float32)
    sum_dz_xhat = tl.zeros([TILE.block_c], tl.float32)
    sum_dz_rhat = tl.zeros([TILE.block_c], tl.float32)

    for first_row in range(start, end, TILE.block_m):
        at = (first_row, first_channel)
        dy = convolve(dout_desc, conv_weight_desc, *at, True, SUMMED_CHANNELS, WIDTH, TILE, BLOCK_K)
        dy = dy.to(dz_desc.dtype)
        row = wide(first_row)
        n_own = end - first_row
        at = (row, n_own, offs_c, mask_c, WIDTH * WIDTH)
        dy_alias = load_tile(dy_alias_ptr, *at, TILE)
        # Load the vectors for every tile, from a cache: kept, they would take registers from the products.
        mean = load_channel(mean_ptr, offs_c, mask_c, 0.0, tl.float32)
        rstd = load_channel(rstd_ptr, offs_c, mask_c, 0.0, tl.float32)
        scale = rstd * load_channel(weight_ptr, offs_c, mask_c, 1.0, tl.float32)
        bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, tl.float32)
        x = load_tile(x_ptr, *at, TILE)
        packed = load_bits(relu_mask_ptr, row, n_own, channel_tile, 0, n_rows, None, TILE)
        dz = preactivation_gradient(dy, dy_alias, x, packed, mean, scale, bias, FORK, True, BITS, TILE)
        sum_dz += tl.sum(dz, axis=0)
        sum_dz_xhat += tl.sum(dz * x_hat(x.to(tl.float32), mean, rstd), axis=0)
        if residual_ptr is not None:
            residual_mean = load_channel(residual_mean_ptr, offs_c, mask_c, 0.0, tl.float32)
            residual_rstd = load_channel(residual_rstd_ptr, offs_c, mask_c, 0.0, tl.float32)
            residual = load_tile(residual_ptr, *at, TILE).to(tl.float32)
            sum_dz_rhat += tl.sum(dz * x_hat(residual, residual_mean, residual_rstd), axis=0)
        dz_desc.store([first_row, first_channel], dz.to(dz_desc.dtype))

    partial = wide(part) * TILE.n_channels + offs_c
    stride = tl.cdiv(n_rows, rows_per_program) * TILE.n_channels
    tl.store(partials_ptr + partial, sum_dz, mask=mask_c)
    tl.store(partials_ptr + stride + partial, sum_dz_xhat, mask=mask_c)
    if residual_ptr is not None:
        tl.store(partials_ptr + 2 * stride + partial, sum_dz_rhat, mask=mask_c)
