"""Batch norm + residual + ReLU, forward: statistics -> combine -> normalize. Equations: README.md beside this file.

x, residual, y are [n_rows, n_channels] in channels_last or NCHW order; per-channel vectors are [n_channels]; partial
results are [n_splits, n_channels]. Arithmetic is in fp32, or in fp64 when x is fp64 (the type of `mean`).
"""

import triton
import triton.language as tl

from .tile_access import bit_offsets, load_channel, normalize, pack_bits, tile_offsets


@triton.jit
def merge_lanes(count, mean, m2):
    """Chan's formula for many parts at once (S2): [P] counts, [P, C] means and M2 -> count, [C] mean, [C] M2."""
    total = tl.sum(count, axis=0)
    share = (count / tl.maximum(total, 1))[:, None]
    # Twice: the second sum is of differences, so it mends the first one's rounding where |mean| >> std.
    estimate = tl.sum(share * mean, axis=0)
    deviation = mean - estimate[None, :]
    correction = tl.sum(share * deviation, axis=0)
    deviation -= correction[None, :]
    merged_m2 = tl.sum(m2 + count[:, None] * deviation * deviation, axis=0)
    return total, estimate + correction, merged_m2


@triton.jit
def pivot_offsets(offs_c, n_spatial, CHANNELS_LAST: tl.constexpr):
    """Where row 0 of x lies: one value per channel."""
    stride_c = 1 if CHANNELS_LAST else n_spatial
    return offs_c.to(tl.int64) * stride_c


@triton.jit
def statistics_kernel(
    x_ptr,
    partial_mean_ptr,
    partial_m2_ptr,
    n_rows,
    n_channels,
    n_spatial,
    rows_per_split,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and centered M2 of one split of rows: Welford in every lane of the tile, the lanes merged at the end (S1).

    What is averaged is x - pivot, with the tensor's first row as pivot: where |mean| >> std the difference is exact,
    and the partial means stay small numbers.
    """
    acc_type: tl.constexpr = partial_mean_ptr.dtype.element_ty
    n_channel_tiles = tl.cdiv(n_channels, BLOCK_C)
    split = (tl.program_id(0) // n_channel_tiles).to(tl.int64)
    offs_c = (tl.program_id(0) % n_channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    offs_m = tl.arange(0, BLOCK_M)
    first_row = split * rows_per_split
    n_own = tl.minimum(n_rows - first_row, rows_per_split).to(tl.int32)

    # The row is loaded into every row of a tile: 16-byte loads, in the layout in which it is used.
    pivot_at = tl.broadcast_to(pivot_offsets(offs_c, n_spatial, CHANNELS_LAST)[None, :], [BLOCK_M, BLOCK_C])
    pivot = tl.load(x_ptr + pivot_at, mask=mask_c[None, :], other=0.0).to(acc_type)

    mean = tl.zeros([BLOCK_M, BLOCK_C], acc_type)
    m2 = tl.zeros([BLOCK_M, BLOCK_C], acc_type)
    for start in range(0, n_own, BLOCK_M):
        mask = (start + offs_m < n_own)[:, None] & mask_c[None, :]
        offsets = tile_offsets(first_row + start, offs_c, n_channels, n_spatial, CHANNELS_LAST, BLOCK_M)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc_type)
        x = tl.where(mask, x - pivot, mean)  # a lane without a row keeps its mean
        delta = x - mean
        mean += delta / tl.full([], start // BLOCK_M + 1, acc_type)
        m2 += delta * (x - mean)

    count = ((n_own - offs_m + BLOCK_M - 1) // BLOCK_M).to(acc_type)
    _, mean, m2 = merge_lanes(count, mean, m2)
    tl.store(partial_mean_ptr + split * n_channels + offs_c, mean, mask=mask_c)
    tl.store(partial_m2_ptr + split * n_channels + offs_c, m2, mask=mask_c)


@triton.jit
def combine_statistics_kernel(
    x_ptr,
    partial_mean_ptr,
    partial_m2_ptr,
    running_mean_ptr,
    running_var_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    n_channels,
    n_spatial,
    n_splits,
    rows_per_split,
    momentum: tl.float64,
    eps: tl.float64,
    TRAINING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean and rstd of the pass, from the partials (TRAINING; also updates the running statistics) or as tracked."""
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels

    if TRAINING:
        count = tl.zeros([], acc_type)
        mean = tl.zeros([BLOCK_C], acc_type)
        m2 = tl.zeros([BLOCK_C], acc_type)
        for start in range(0, n_splits, BLOCK_S):
            offs_s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
            mask = (offs_s < n_splits)[:, None] & mask_c[None, :]
            offsets = offs_s[:, None] * n_channels + offs_c[None, :]
            rows = tl.maximum(tl.minimum(n_rows - offs_s * rows_per_split, rows_per_split), 0).to(acc_type)
            part_mean = tl.load(partial_mean_ptr + offsets, mask=mask, other=0.0)
            part_m2 = tl.load(partial_m2_ptr + offsets, mask=mask, other=0.0)
            step_count, step_mean, step_m2 = merge_lanes(rows, part_mean, part_m2)
            # Chan's formula for two parts (S3); `count` is 0 in the first step.
            total = count + step_count
            delta = step_mean - mean
            m2 += step_m2 + delta * delta * (count * (step_count / total))
            mean += delta * (step_count / total)
            count = total
        pivot_at = pivot_offsets(offs_c, n_spatial, CHANNELS_LAST)
        mean += tl.load(x_ptr + pivot_at, mask=mask_c, other=0.0).to(acc_type)
        variance = m2 / count
        if running_mean_ptr is not None:
            unbiased = m2 / (count - 1)
            new = tl.full([], momentum, acc_type)
            old = tl.full([], 1.0 - momentum, acc_type)
            running_mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(acc_type)
            running_var = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(acc_type)
            tl.store(running_mean_ptr + offs_c, new * mean + old * running_mean, mask=mask_c)
            tl.store(running_var_ptr + offs_c, new * unbiased + old * running_var, mask=mask_c)
    else:
        mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(acc_type)
        variance = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(acc_type)

    tl.store(mean_ptr + offs_c, mean, mask=mask_c)
    tl.store(rstd_ptr + offs_c, 1.0 / tl.sqrt(variance + tl.full([], eps, acc_type)), mask=mask_c)


@triton.jit
def normalize_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    residual_mean_ptr,
    residual_rstd_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    y_ptr,
    relu_mask_ptr,
    n_rows,
    n_channels,
    n_spatial,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = relu(bn(x) + residual) (N1-N3): no residual, a residual, or a residual with a batch norm of its own.

    With a residual and ReLU the signs go to `relu_mask_ptr`, one bit each; without a residual the backward recomputes
    them from x, for less traffic than a mask.
    """
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    n_channel_tiles = tl.cdiv(n_channels, BLOCK_C)
    first_row = (tl.program_id(0) // n_channel_tiles).to(tl.int64) * BLOCK_M
    first_channel = (tl.program_id(0) % n_channel_tiles) * BLOCK_C
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    mask = (first_row + tl.arange(0, BLOCK_M) < n_rows)[:, None] & mask_c[None, :]
    offsets = tile_offsets(first_row, offs_c, n_channels, n_spatial, CHANNELS_LAST, BLOCK_M)

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc_type)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_type)
    mean = load_channel(mean_ptr, offs_c, mask_c, 0.0, acc_type)
    scale = load_channel(rstd_ptr, offs_c, mask_c, 0.0, acc_type) * load_channel(
        weight_ptr, offs_c, mask_c, 1.0, acc_type
    )
    z = normalize(x, mean, scale, load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type))
    if residual_mean_ptr is not None:
        mean = load_channel(residual_mean_ptr, offs_c, mask_c, 0.0, acc_type)
        scale = load_channel(residual_rstd_ptr, offs_c, mask_c, 0.0, acc_type) * load_channel(
            residual_weight_ptr, offs_c, mask_c, 1.0, acc_type
        )
        residual = normalize(residual, mean, scale, load_channel(residual_bias_ptr, offs_c, mask_c, 0.0, acc_type))
    if residual_ptr is not None:
        z += residual

    # The one rounding. ReLU looks at the rounded value and lets NaN through, as torch does.
    y = z.to(y_ptr.dtype.element_ty).to(acc_type)
    if RELU:
        drop = y <= 0.0
        if relu_mask_ptr is not None:
            bytes_at, valid = bit_offsets(first_row, first_channel, n_rows, n_channels, CHANNELS_LAST, BLOCK_M, BLOCK_C)
            tl.store(relu_mask_ptr + bytes_at, pack_bits(drop, CHANNELS_LAST, BLOCK_M, BLOCK_C), mask=valid)
        y = tl.where(drop, 0.0, y)
    tl.store(y_ptr + offsets, y, mask=mask)
