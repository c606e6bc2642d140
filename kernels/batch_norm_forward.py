"""Batch norm + residual + ReLU, forward: statistics -> combine -> normalize. Equations: README.md beside this file.

x, residual, y are [n_rows, n_channels] in channels_last or NCHW order; per-channel vectors are [n_channels], those of
the pass, mean and rstd, [n_groups, n_channels] (tile_access.py: groups); partial results are [n_splits, n_channels].
Arithmetic is in fp32, or in fp64 when x is fp64 (the type of `mean`).
"""

import triton
import triton.language as tl

from .tile_access import (
    bit_offsets,
    group_of_rows,
    known_multiple,
    load_channel,
    locate,
    normalize,
    pack_bits,
    program_index,
    tile_offsets,
)

# Where a square overflows, statistics are computed once more, of x · UNIT: 2^31 squares of fp32's maximum fit then.
UNIT = tl.constexpr(2.0**-100)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def load_row(x_ptr, row, offs_c, mask_c, n_channels, n_spatial, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr):
    """One row of x, [BLOCK_M, BLOCK_C]: each row of a tile its own copy, loaded 16 bytes wide where x is."""
    offsets = tile_offsets(row, offs_c, n_channels, n_spatial, CHANNELS_LAST, 1)
    offsets = tl.broadcast_to(offsets, [BLOCK_M, offs_c.shape[0]])
    return tl.load(x_ptr + offsets, mask=mask_c[None, :], other=0.0)


@triton.jit
def load_pivot(
    x_ptr, start, end, offs_c, n_channels, n_spatial, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, acc_type
):
    """[BLOCK_C], the median of a group's first, middle and last row: typical even where one of them is an outlier."""
    mask_c = offs_c < n_channels
    start = tl.full([], 0, tl.int64) + start
    first = load_row(x_ptr, start, offs_c, mask_c, n_channels, n_spatial, CHANNELS_LAST, BLOCK_M).to(acc_type)
    middle = load_row(
        x_ptr, start + (end - start) // 2, offs_c, mask_c, n_channels, n_spatial, CHANNELS_LAST, BLOCK_M
    ).to(acc_type)
    last = load_row(x_ptr, start + (end - start) - 1, offs_c, mask_c, n_channels, n_spatial, CHANNELS_LAST, BLOCK_M).to(
        acc_type
    )
    median = tl.maximum(tl.minimum(first, middle), tl.minimum(tl.maximum(first, middle), last))
    return tl.max(tl.where(is_finite(median), median, 0.0), axis=0)


@triton.jit
def merge_lanes(count, mean, m2):
    """Chan's formula for many parts at once (S2): [P] counts, [P, C] means and M2 -> count, [C] mean, [C] M2.

    The mean comes in two parts, an estimate and what its rounding lost: the sum of the deviations from it.
    """
    total = tl.sum(count, axis=0)
    share = 1 / tl.maximum(total, 1)
    estimate = tl.sum(count[:, None] * mean, axis=0) * share
    deviation = mean - estimate[None, :]
    lost = tl.sum(count[:, None] * deviation, axis=0) * share
    deviation -= lost[None, :]
    merged_m2 = tl.sum(m2 + count[:, None] * deviation * deviation, axis=0)
    return total, estimate, tl.where(is_finite(estimate), lost, 0.0), merged_m2


@triton.jit
def split_statistics(
    x_ptr,
    first_row,
    n_own,
    start,
    end,
    offs_c,
    n_channels,
    n_spatial,
    unit,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_C] mean and M2 of (x - pivot)·unit over `n_own` rows: Welford in every lane, then merged (S1, S2).

    The pivot is that of the rows from `start` to `end`, the whole group.
    """
    mask_c = offs_c < n_channels
    offs_m = tl.arange(0, BLOCK_M)
    pivot = load_pivot(x_ptr, start, end, offs_c, n_channels, n_spatial, CHANNELS_LAST, BLOCK_M, unit.dtype) * unit
    mean = tl.zeros([BLOCK_M, BLOCK_C], unit.dtype)
    m2 = tl.zeros([BLOCK_M, BLOCK_C], unit.dtype)
    for row in range(0, n_own, BLOCK_M):
        mask = (row + offs_m < n_own)[:, None] & mask_c[None, :]
        offsets = tile_offsets(first_row + row, offs_c, n_channels, n_spatial, CHANNELS_LAST, BLOCK_M)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(unit.dtype) * unit
        x = tl.where(mask, x - pivot[None, :], mean)  # a lane without a row keeps its mean
        delta = x - mean
        mean += tl.where(is_finite(mean), delta * (1 / tl.full([], row // BLOCK_M + 1, unit.dtype)), x)
        m2 += delta * (x - mean)

    count = ((n_own - offs_m + BLOCK_M - 1) // BLOCK_M).to(unit.dtype)
    _, mean, lost, m2 = merge_lanes(count, mean, m2)
    return mean + lost, m2


@triton.jit
def statistics_kernel(
    x_ptr,
    partial_mean_ptr,
    partial_m2_ptr,
    n_rows,
    n_channels,
    n_spatial,
    rows_per_group,
    rows_per_split,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and centered M2 of one split of rows. A negative M2 stands for its magnitude in units of 1/UNIT².

    What is averaged is x - pivot: where |mean| >> std the difference is exact, and the means stay small numbers.
    """
    acc_type: tl.constexpr = partial_mean_ptr.dtype.element_ty
    n_channels = known_multiple(n_channels, CHANNEL_GROUP)
    n_channel_tiles = tl.cdiv(n_channels, BLOCK_C)
    split = tl.program_id(0) // n_channel_tiles
    offs_c = (tl.program_id(0) % n_channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    group, first_row, _ = locate(split, rows_per_split, n_rows, rows_per_group)
    start, end = group_of_rows(group, n_rows, rows_per_group)
    n_own = tl.minimum(end - first_row, rows_per_split).to(tl.int32)
    partial = split.to(tl.int64) * n_channels + offs_c

    todo = (offs_c < n_channels).to(tl.int32)
    rescue = tl.full([], 0, tl.int32)  # 1 where a square has overflowed, or x holds Inf or NaN
    while tl.max(todo, axis=0) > 0:
        unit = tl.where(rescue > 0, UNIT, 1.0).to(acc_type)
        mean, m2 = split_statistics(
            x_ptr, first_row, n_own, start, end, offs_c, n_channels, n_spatial, unit, CHANNELS_LAST, BLOCK_M, BLOCK_C
        )
        done = todo & (is_finite(m2).to(tl.int32) | rescue)
        tl.store(partial_mean_ptr + partial, mean / unit, mask=done > 0)
        tl.store(partial_m2_ptr + partial, tl.where(rescue > 0, -m2, m2), mask=done > 0)
        todo -= done
        rescue = 1


@triton.jit
def merge_splits(
    partial_mean_ptr,
    partial_m2_ptr,
    offs_c,
    n_rows,
    n_channels,
    n_splits,
    rows_per_split,
    unit,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_C] mean, in two parts as in `merge_lanes`, and M2 of (x - pivot)·unit over a group's rows (S2, S3)."""
    count = tl.zeros([], unit.dtype)
    mean = tl.zeros([BLOCK_C], unit.dtype)
    lost = tl.zeros([BLOCK_C], unit.dtype)
    m2 = tl.zeros([BLOCK_C], unit.dtype)
    for start in range(0, n_splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)  # of few enough partials for 32-bit offsets (tiles.TARGET_PROGRAMS)
        mask = (offs_s < n_splits)[:, None] & (offs_c < n_channels)[None, :]
        offsets = offs_s[:, None] * n_channels + offs_c[None, :]
        rows = tl.minimum(n_rows - offs_s.to(tl.int64) * rows_per_split, rows_per_split)
        rows = tl.maximum(rows, 0).to(unit.dtype)
        part_mean = tl.load(partial_mean_ptr + offsets, mask=mask, other=0.0) * unit
        part_m2 = tl.load(partial_m2_ptr + offsets, mask=mask, other=0.0)
        part_m2 = tl.where(part_m2 < 0, -part_m2 * (unit / UNIT) * (unit / UNIT), part_m2 * unit * unit)
        step_count, step_mean, step_lost, step_m2 = merge_lanes(rows, part_mean, part_m2)
        # Chan's formula for two parts (S3); `count` is 0 in the first step.
        total = count + step_count
        share = step_count / total
        delta = (step_mean - mean) + (step_lost - lost)
        m2 += step_m2 + delta * delta * (count * share)
        merged = mean + tl.where(is_finite(mean), delta * share, step_mean)
        lost += tl.where(is_finite(merged), delta * share - (merged - mean), 0.0)
        mean = merged
        count = total
    return mean, lost, m2


@triton.jit
def combine_statistics_kernel(
    x_ptr,
    partial_mean_ptr,
    partial_m2_ptr,
    running_mean_ptr,
    running_var_ptr,
    mean_ptr,
    rstd_ptr,
    var_ptr,
    n_rows,
    n_channels,
    n_spatial,
    rows_per_group,
    rows_per_split,
    n_groups,
    group_splits,
    momentum: tl.float64,
    eps: tl.float64,
    TRAINING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean and rstd of the pass, from the partials (TRAINING; also updates the running statistics) or as tracked.

    The running statistics take one group after the other, in the accumulation type, as if each were a batch (S4).
    `group_splits` are those of a whole group. `var_ptr` receives the biased variance of the partials; in fp64 that of
    huge values fits. Without `x_ptr` the partial means are those of x itself, about no pivot (conv3x3.py).
    """
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    epsilon = tl.full([], eps, acc_type)

    if running_mean_ptr is not None:
        running_mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(acc_type)
        running_var = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(acc_type)

    for group in range(0, n_groups):
        group_offs_c = (tl.full([], 0, tl.int64) + group) * n_channels + offs_c
        if TRAINING:
            start, end = group_of_rows(group, n_rows, rows_per_group)
            if rows_per_group is None:
                group_rows = n_rows
                own_splits = group_splits
            else:
                group_rows = end - start
                own_splits = tl.cdiv(group_rows, rows_per_split).to(tl.int32)
            first_partial = (tl.full([], 0, tl.int64) + group) * group_splits * n_channels
            if x_ptr is None:
                pivot = tl.zeros([BLOCK_C], acc_type)
            else:
                pivot = load_pivot(x_ptr, start, end, offs_c, n_channels, n_spatial, CHANNELS_LAST, 1, acc_type)
            todo = mask_c.to(tl.int32)
            rescue = tl.full([], 0, tl.int32)
            while tl.max(todo, axis=0) > 0:
                unit = tl.where(rescue > 0, UNIT, 1.0).to(acc_type)
                mean, lost, m2 = merge_splits(
                    partial_mean_ptr + first_partial,
                    partial_m2_ptr + first_partial,
                    offs_c,
                    group_rows,
                    n_channels,
                    own_splits,
                    rows_per_split,
                    unit,
                    BLOCK_S,
                    BLOCK_C,
                )
                done = todo & (is_finite(m2).to(tl.int32) | rescue)
                mean = (mean / unit + pivot) + lost / unit
                tl.store(mean_ptr + group_offs_c, mean, mask=done > 0)
                rstd = unit / tl.sqrt(m2 / group_rows + epsilon * unit * unit)
                tl.store(rstd_ptr + group_offs_c, rstd, mask=done > 0)
                if var_ptr is not None:
                    variance = (m2 / group_rows).to(var_ptr.dtype.element_ty)
                    tl.store(var_ptr + group_offs_c, variance / unit / unit, mask=done > 0)
                if running_mean_ptr is not None:
                    new = tl.full([], momentum, acc_type)
                    old = tl.full([], 1.0 - momentum, acc_type)
                    unbiased = m2 / (group_rows - 1) / unit / unit
                    running_mean = tl.where(done > 0, new * mean + old * running_mean, running_mean)
                    running_var = tl.where(done > 0, new * unbiased + old * running_var, running_var)
                todo -= done
                rescue = 1
        else:
            tl.store(mean_ptr + group_offs_c, running_mean, mask=mask_c)
            tl.store(rstd_ptr + group_offs_c, 1.0 / tl.sqrt(running_var + epsilon), mask=mask_c)

    if TRAINING and running_mean_ptr is not None:
        tl.store(running_mean_ptr + offs_c, running_mean, mask=mask_c)
        tl.store(running_var_ptr + offs_c, running_var, mask=mask_c)


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
    rows_per_group,
    RELU: tl.constexpr,
    REVERSED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = relu(bn(x) + residual) (N1-N3): no residual, a residual, or a residual with a batch norm of its own.

    With a residual and ReLU the signs go to `relu_mask_ptr`, one bit each; without a residual the backward recomputes
    them from x, for less traffic than a mask.
    """
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    LAST_USE: tl.constexpr = "evict_first" if REVERSED else ""
    n_channels = known_multiple(n_channels, CHANNEL_GROUP)
    n_channel_tiles = tl.cdiv(n_channels, BLOCK_C)
    index = program_index(REVERSED)
    group, first_row, end = locate(index // n_channel_tiles, BLOCK_M, n_rows, rows_per_group)
    first_channel = (index % n_channel_tiles) * BLOCK_C
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    group_offs_c = group * n_channels + offs_c
    mask_c = offs_c < n_channels
    mask = (first_row + tl.arange(0, BLOCK_M) < end)[:, None] & mask_c[None, :]
    offsets = tile_offsets(first_row, offs_c, n_channels, n_spatial, CHANNELS_LAST, BLOCK_M)

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0, eviction_policy=LAST_USE).to(acc_type)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0, eviction_policy=LAST_USE).to(acc_type)
    mean = load_channel(mean_ptr, group_offs_c, mask_c, 0.0, acc_type)
    scale = load_channel(rstd_ptr, group_offs_c, mask_c, 0.0, acc_type) * load_channel(
        weight_ptr, offs_c, mask_c, 1.0, acc_type
    )
    z = normalize(x, mean, scale, load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type))
    if residual_mean_ptr is not None:
        mean = load_channel(residual_mean_ptr, group_offs_c, mask_c, 0.0, acc_type)
        scale = load_channel(residual_rstd_ptr, group_offs_c, mask_c, 0.0, acc_type) * load_channel(
            residual_weight_ptr, offs_c, mask_c, 1.0, acc_type
        )
        residual = normalize(residual, mean, scale, load_channel(residual_bias_ptr, offs_c, mask_c, 0.0, acc_type))
    if residual_ptr is not None:
        z += residual

    # The one rounding. ReLU looks at the rounded value and lets NaN through, as torch does.
    y = z.to(y_ptr.dtype.element_ty).to(acc_type)
    if RELU:
        relu_mask = y <= 0.0
        if relu_mask_ptr is not None:
            bytes_at, valid = bit_offsets(
                first_row,
                first_channel,
                group,
                n_rows,
                n_channels,
                rows_per_group,
                CHANNELS_LAST,
                BLOCK_M,
                BLOCK_C,
            )
            tl.store(relu_mask_ptr + bytes_at, pack_bits(relu_mask, CHANNELS_LAST, BLOCK_M, BLOCK_C), mask=valid)
        y = tl.where(relu_mask, 0.0, y)
    tl.store(y_ptr + offsets, y, mask=mask)
