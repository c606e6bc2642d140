"""Batch norm + residual + ReLU, forward: statistics -> combine -> normalize. Equations: README.md beside this file.

x, residual, y are [n_rows, n_channels] in channels_last or NCHW order; per-channel vectors are [n_channels], those of
the pass, mean and rstd, [n_groups, n_channels] (tile_access.py: groups). Partial results are [2, n_splits, n_channels]:
mean and M2. Arithmetic is in fp32, or in fp64 when x is fp64.

Few partial results are merged by the programs of `normalize_kernel`, each for itself, many by a launch of their own.
"""

import triton
import triton.language as tl

from .tile_access import (
    bit_offsets,
    channels_of,
    group_of_rows,
    load_channel,
    load_tile,
    load_tiles,
    locate,
    normalize,
    pack_bits,
    part_of_program,
    program_index,
    store_tile,
    tile_mask,
    tile_pointers,
    wait_for_previous_kernel,
    wide,
)

# Where a square overflows, statistics are computed once more, of x · UNIT: 2^31 squares of fp32's maximum fit then.
UNIT = tl.constexpr(2.0**-100)

PIVOT_ROWS = tl.constexpr(16)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def add_differences(x, pivot, unit, mask, total, squares):
    """Add x·unit - pivot, and its square, to the sums (S1); without those outside of `mask`, if there is one."""
    difference = tl.fma(x.to(unit.dtype), tl.broadcast_to(unit, x.shape), tl.broadcast_to(-pivot[None, :], x.shape))
    if mask is not None:
        difference = tl.where(mask, difference, 0.0)
    return total + difference, tl.fma(difference, difference, squares)


@triton.jit
def add_and_range(sum_a, highest_a, lowest_a, sum_b, highest_b, lowest_b):
    return sum_a + sum_b, tl.maximum(highest_a, highest_b), tl.minimum(lowest_a, lowest_b)


@triton.jit
def load_row(x_ptr, first_row, offs_c, mask_c, n_spatial, TILE: tl.constexpr):
    if TILE.channels_last:
        pointers = x_ptr + first_row * TILE.n_channels + offs_c
    else:
        pointers = x_ptr + (first_row // n_spatial * TILE.n_channels + offs_c) * n_spatial + first_row % n_spatial
    return tl.load(pointers, mask=mask_c, other=0.0)


@triton.jit
def find_pivot(rows, row, n_own, mask_c, unit):
    """[BLOCK_C], the mean of a split's first rows without the highest and lowest value, times unit.

    So near to the split's mean little cancels in M2, and one outlier does no harm. It is taken about the first row: of
    a constant channel all differences are 0.
    """
    first = row.to(unit.dtype) * unit
    first = tl.where(is_finite(first), first, 0.0)
    mask = (tl.arange(0, PIVOT_ROWS) < n_own)[:, None] & mask_c[None, :]
    total = tl.where(mask, rows.to(unit.dtype) * unit - first[None, :], 0.0)
    total, highest, lowest = tl.reduce((total, total, total), 0, add_and_range)
    n_rows = tl.maximum(tl.minimum(n_own, PIVOT_ROWS) - 2, 1).to(unit.dtype)
    mean = first + (total - highest - lowest) * (1 / n_rows)
    return tl.where(is_finite(mean), mean, first)


@triton.jit
def shift_and_m2(total, squares, n_rows):
    """[BLOCK_C], how far the mean of `n_rows` rows is from the pivot, and M2, from [P, BLOCK_C] sums of differences."""
    total, squares = tl.reduce((total, squares), 0, add_pairs)
    shift = total * (1 / (tl.full([], 0.0, total.dtype) + n_rows))
    m2 = tl.fma(-total, shift, squares)
    return shift, tl.where(m2 < 0, 0.0, m2)  # rounding can leave less than 0; NaN stays


@triton.jit
def in_units(m2, unit):
    """A stored partial M2 in units of 1/unit²."""
    return tl.where(m2 < 0, -m2 * (unit / UNIT) * (unit / UNIT), m2 * unit * unit)


@triton.jit
def overflows(m2, mask_c, unit):
    """Channels whose M2 is not finite, and whether to compute that once more, of x·UNIT."""
    todo = mask_c & (is_finite(m2) == 0)
    return todo, (tl.max(todo.to(tl.int32), axis=0) > 0) & (unit == 1)


@triton.jit
def store_partial(partial_ptrs, stride, mean, m2, unit, mask_c):
    """Store the mean and M2 of x·unit; return whether to compute them once more, of x·UNIT.

    Then only those channels are stored whose M2 was not finite. A negative M2 stands for its magnitude in units of
    1/UNIT².
    """
    m2_ptrs = partial_ptrs + stride
    stored = tl.load(m2_ptrs, mask=mask_c & (unit < 1), other=float("inf"))
    mask = mask_c & (is_finite(stored) == 0)
    tl.store(partial_ptrs, mean * (1 / unit), mask=mask)
    tl.store(m2_ptrs, tl.where(unit < 1, -m2, m2), mask=mask)
    return overflows(m2, mask_c, unit)[1]


@triton.jit
def split_statistics(x_ptr, first_row, n_own, offs_c, mask_c, n_spatial, unit, TILE: tl.constexpr):
    """[BLOCK_C] mean and M2 of x·unit over `n_own` rows; each thread has N_TILES loads on their way (S1)."""
    STEP: tl.constexpr = TILE.n_tiles * TILE.block_m
    offs_m = tl.arange(0, TILE.block_m)
    whole_rows = n_own // STEP * STEP  # of steps that need no mask
    total = tl.zeros([TILE.block_m, TILE.block_c], unit.dtype)
    squares = tl.zeros([TILE.block_m, TILE.block_c], unit.dtype)
    row = load_row(x_ptr, first_row, offs_c, mask_c, n_spatial, TILE)
    offs_p = tl.arange(0, PIVOT_ROWS)
    rows = tl.load(tile_pointers(x_ptr, first_row, offs_p, offs_c, n_spatial, TILE), mask=(offs_p < n_own)[:, None] & mask_c[None, :], other=0.0)
    tl.debug_barrier()  # lest ptxas puts these loads behind the others, and the pivot waits for all
    tiles = ()
    for k in tl.static_range(TILE.n_tiles):
        pointers = tile_pointers(x_ptr, first_row + k * TILE.block_m, offs_m, offs_c, n_spatial, TILE)
        tiles += (tl.load(pointers, mask=(whole_rows > 0) & mask_c[None, :], other=0.0),)
    pivot = find_pivot(rows, row, n_own, mask_c, unit)
    for start in range(STEP, whole_rows + STEP, STEP):
        ahead = ()
        for k in tl.static_range(TILE.n_tiles):  # each tile makes room for that of the next step
            total, squares = add_differences(tiles[k], pivot, unit, None, total, squares)
            pointers = tile_pointers(x_ptr, first_row + start + k * TILE.block_m, offs_m, offs_c, n_spatial, TILE)
            ahead += (tl.load(pointers, mask=(start < whole_rows) & mask_c[None, :], other=0.0),)
        tiles = ahead
    if whole_rows < n_own:
        n_left = n_own - whole_rows
        tiles = load_tiles(x_ptr, first_row + whole_rows, n_left, offs_c, mask_c, n_spatial, TILE)
        for k in tl.static_range(TILE.n_tiles):
            mask = tile_mask(n_left - k * TILE.block_m, mask_c, TILE)
            total, squares = add_differences(tiles[k], pivot, unit, mask, total, squares)
    shift, m2 = shift_and_m2(total, squares, n_own)
    return pivot + shift, m2


@triton.jit
def statistics_kernel(
    x_ptr,
    partials_ptr,
    n_rows,
    n_spatial,
    rows_per_group,
    rows_per_split,
    n_splits,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Mean and centered M2 of one split of rows."""
    wait_for_previous_kernel(PDL)
    acc_type: tl.constexpr = partials_ptr.dtype.element_ty
    split, channel_tile = part_of_program(tl.program_id(0), TILE)
    offs_c, mask_c = channels_of(channel_tile, TILE.n_channels, TILE.block_c)
    _, first_row, n_own = locate(split, rows_per_split, n_rows, rows_per_group)
    partial_ptrs = partials_ptr + wide(split) * TILE.n_channels + offs_c

    unit = tl.full([], 1.0, acc_type)
    again = tl.full([], 1, tl.int1)
    while again:  # twice where a square has overflowed, or x holds Inf or NaN
        mean, m2 = split_statistics(x_ptr, first_row, n_own, offs_c, mask_c, n_spatial, unit, TILE)
        again = store_partial(partial_ptrs, wide(n_splits) * TILE.n_channels, mean, m2, unit, mask_c)
        unit = tl.full([], UNIT, acc_type)


@triton.jit
def merge_splits(
    partials_ptr,
    stride,
    offs_c,
    mask_c,
    n_rows,
    n_splits,
    rows_per_split,
    unit,
    N_CHANNELS: tl.constexpr,
    n_steps,
    BLOCK_S: tl.constexpr,
):
    """[BLOCK_C] mean and M2 of x·unit over a group's rows: sums about the mean of its first split (S2).

    `n_steps` are those of BLOCK_S splits; where it is a constant 1 there is no loop, and no load waits for another.
    """
    pivot = load_channel(partials_ptr, offs_c, mask_c, 0.0, unit.dtype) * unit
    pivot = tl.where(is_finite(pivot), pivot, 0.0)
    full_rows = tl.full([], 0.0, unit.dtype) + rows_per_split
    last_rows = tl.full([], 0.0, unit.dtype) + (n_rows - wide(n_splits - 1) * rows_per_split)
    total = tl.zeros([BLOCK_S, offs_c.shape[0]], unit.dtype)
    squares = tl.zeros([BLOCK_S, offs_c.shape[0]], unit.dtype)
    for step in range(0, n_steps):
        offs_s = step * BLOCK_S + tl.arange(0, BLOCK_S)  # 32-bit offsets: there are few partial results
        mask = (offs_s < n_splits)[:, None] & mask_c[None, :]
        pointers = partials_ptr + (offs_s[:, None] * N_CHANNELS + offs_c[None, :])
        mean = tl.load(pointers, mask=mask, other=0.0)
        m2 = in_units(tl.load(pointers + stride, mask=mask, other=0.0), unit)
        rows = tl.where(offs_s < n_splits - 1, full_rows, tl.where(offs_s < n_splits, last_rows, 0.0))[:, None]
        difference = mean * unit - pivot[None, :]
        total += rows * difference
        squares += tl.fma(rows * difference, difference, m2)
    shift, m2 = shift_and_m2(total, squares, n_rows)
    return pivot + shift, m2


@triton.jit
def group_statistics(
    partials_ptr,
    stride,
    offs_c,
    mask_c,
    n_rows,
    n_splits,
    rows_per_split,
    N_CHANNELS: tl.constexpr,
    n_steps,
    BLOCK_S: tl.constexpr,
):
    """[BLOCK_C] mean of a group, biased variance in units of 1/unit², and unit: 1 where that does not overflow."""
    acc_type: tl.constexpr = partials_ptr.dtype.element_ty
    mean = tl.zeros(offs_c.shape, acc_type)
    var = tl.zeros(offs_c.shape, acc_type)
    units = tl.full(offs_c.shape, 1.0, acc_type)
    unit = tl.full([], 1.0, acc_type)
    todo = mask_c
    again = tl.full([], 1, tl.int1)
    which = (stride, offs_c, mask_c, n_rows, n_splits, rows_per_split)
    while again:
        merged_mean, m2 = merge_splits(partials_ptr, *which, unit, N_CHANNELS, n_steps, BLOCK_S)
        mean = tl.where(todo, merged_mean * (1 / unit), mean)
        var = tl.where(todo, m2 * (1 / (tl.full([], 0.0, acc_type) + n_rows)), var)
        units = tl.where(todo, unit, units)
        todo, again = overflows(m2, mask_c, unit)
        unit = tl.full([], UNIT, acc_type)
    return mean, var, units


@triton.jit
def inverse_std(var, eps, units):
    """1/sqrt(variance + eps), of a variance in units of 1/units²."""
    x = var + tl.full([], eps, var.dtype) * units * units
    if var.dtype == tl.float64:  # of which tl.rsqrt computes some digits only
        rstd = units / tl.sqrt(x)
    else:
        rstd = units * tl.rsqrt(x)
    return rstd


@triton.jit
def updated_running(running_mean, running_var, mean, var, units, n_rows, momentum):
    """Running statistics with those of one more batch (S4); `var` is biased and in units of 1/units²."""
    share = tl.full([], momentum, mean.dtype)
    rest = tl.full([], 1.0 - momentum, mean.dtype)
    unbiased = var * (n_rows / (tl.full([], -1.0, var.dtype) + n_rows)) * (1 / units) * (1 / units)
    return share * mean + rest * running_mean, share * unbiased + rest * running_var


@triton.jit
def combine_statistics_kernel(
    partials_ptr,
    running_mean_ptr,
    running_var_ptr,
    mean_ptr,
    rstd_ptr,
    var_ptr,
    n_rows,
    rows_per_group,
    rows_per_split,
    n_splits,
    n_groups,
    group_splits,
    momentum: tl.float64,
    eps: tl.float64,
    N_CHANNELS: tl.constexpr,
    N_STEPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """mean and rstd of the pass from the partial results; updates the running statistics.

    These take one group after the other, in the accumulation type, as if each were a batch (S4). `group_splits` are
    those of a whole group. `var_ptr` receives the biased variance; in fp64 that of huge values fits.
    """
    wait_for_previous_kernel(PDL)
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    offs_c, mask_c = channels_of(tl.program_id(0), N_CHANNELS, BLOCK_C)
    stride = wide(n_splits) * N_CHANNELS
    running_mean = load_channel(running_mean_ptr, offs_c, mask_c, 0.0, acc_type)
    running_var = load_channel(running_var_ptr, offs_c, mask_c, 0.0, acc_type)
    for group in range(0, n_groups):
        first_split = wide(group) * group_splits
        start, end = group_of_rows(group, n_rows, rows_per_group)
        own_splits = tl.minimum(n_splits - first_split, group_splits).to(tl.int32)
        which = (stride, offs_c, mask_c, end - start, own_splits, rows_per_split)
        mean, var, units = group_statistics(
            partials_ptr + first_split * N_CHANNELS, *which, N_CHANNELS, N_STEPS, BLOCK_S
        )
        group_offs_c = wide(group) * N_CHANNELS + offs_c
        tl.store(mean_ptr + group_offs_c, mean, mask=mask_c)
        tl.store(rstd_ptr + group_offs_c, inverse_std(var, eps, units), mask=mask_c)
        if var_ptr is not None:
            tl.store(var_ptr + group_offs_c, var.to(var_ptr.dtype.element_ty) / units / units, mask=mask_c)
        if running_mean_ptr is not None:
            new = (mean, var, units, end - start)
            running_mean, running_var = updated_running(running_mean, running_var, *new, momentum)
    if running_mean_ptr is not None:
        tl.store(running_mean_ptr + offs_c, running_mean, mask=mask_c)
        tl.store(running_var_ptr + offs_c, running_var, mask=mask_c)


@triton.jit
def pass_statistics(
    partials_ptr,
    running_mean_ptr,
    running_var_ptr,
    mean_ptr,
    rstd_ptr,
    group,
    offs_c,
    mask_c,
    is_first,
    n_rows,
    n_splits,
    rows_per_split,
    momentum,
    eps,
    N_CHANNELS: tl.constexpr,
    n_steps,
    BLOCK_S: tl.constexpr,
):
    """[BLOCK_C] mean and rstd of the pass: of partial results, if given, or of running statistics, if given, or read.

    The first program of a group and tile of channels stores what the others find, too, and updates the running
    statistics.
    """
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    group_offs_c = group * N_CHANNELS + offs_c
    first_mask = mask_c & is_first
    if partials_ptr is not None:
        which = (wide(n_splits) * N_CHANNELS, offs_c, mask_c, n_rows, n_splits, rows_per_split)
        mean, var, units = group_statistics(partials_ptr, *which, N_CHANNELS, n_steps, BLOCK_S)
        rstd = inverse_std(var, eps, units)
        if running_mean_ptr is not None:
            running_mean = load_channel(running_mean_ptr, offs_c, first_mask, 0.0, acc_type)
            running_var = load_channel(running_var_ptr, offs_c, first_mask, 0.0, acc_type)
            new = (mean, var, units, n_rows)
            running_mean, running_var = updated_running(running_mean, running_var, *new, momentum)
            tl.store(running_mean_ptr + offs_c, running_mean, mask=first_mask)
            tl.store(running_var_ptr + offs_c, running_var, mask=first_mask)
    elif running_mean_ptr is not None:
        mean = load_channel(running_mean_ptr, offs_c, mask_c, 0.0, acc_type)
        rstd = inverse_std(load_channel(running_var_ptr, offs_c, mask_c, 1.0, acc_type), eps, 1.0)
    else:
        mean = load_channel(mean_ptr, group_offs_c, mask_c, 0.0, acc_type)
        rstd = load_channel(rstd_ptr, group_offs_c, mask_c, 0.0, acc_type)
    if partials_ptr is not None or running_mean_ptr is not None:
        tl.store(mean_ptr + group_offs_c, mean, mask=first_mask)
        tl.store(rstd_ptr + group_offs_c, rstd, mask=first_mask)
    return mean, rstd


@triton.jit
def relu_and_bits(z, y_ptr, relu_mask_ptr, row, n_own, channel_tile, group, n_rows, rows_per_group, TILE: tl.constexpr):
    """relu(z) in the data type; stores the bits of where it closed, if they are wanted (N3).

    The one rounding. ReLU looks at the rounded value and lets NaN through, as torch does.
    """
    y = z.to(y_ptr.dtype.element_ty)
    relu_mask = y.to(z.dtype) <= 0.0
    if relu_mask_ptr is not None:
        offsets, valid = bit_offsets(row, n_own, channel_tile, group, n_rows, rows_per_group, TILE)
        tl.store(relu_mask_ptr + offsets, pack_bits(relu_mask, TILE), mask=valid)
    return tl.where(relu_mask, 0.0, y)


@triton.jit
def normalize_kernel(
    x_ptr,
    partials_ptr,
    running_mean_ptr,
    running_var_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    residual_partials_ptr,
    residual_running_mean_ptr,
    residual_running_var_ptr,
    residual_mean_ptr,
    residual_rstd_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    y_ptr,
    relu_mask_ptr,
    n_rows,
    n_spatial,
    rows_per_group,
    rows_per_split,
    n_splits,
    momentum: tl.float64,
    eps: tl.float64,
    residual_momentum: tl.float64,
    residual_eps: tl.float64,
    RELU: tl.constexpr,
    REVERSED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = relu(bn(x) + residual) (N1-N3): no residual, a residual, or a residual with a batch norm of its own.

    With a residual and ReLU the signs go to `relu_mask_ptr`, one bit each; without a residual the backward recomputes
    them from x, for less traffic than a mask. Two norms with the same running statistics must both take them from
    batches, or neither: no program waits until another has read what it updates.
    """
    wait_for_previous_kernel(PDL)
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    part, channel_tile = part_of_program(program_index(REVERSED), TILE)
    offs_c, mask_c = channels_of(channel_tile, TILE.n_channels, TILE.block_c)
    group, first_row, n_own = locate(part, TILE.n_tiles * TILE.block_m, n_rows, rows_per_group)
    group_start, group_end = group_of_rows(group, n_rows, rows_per_group)
    group_rows = group_end - group_start

    which = (group, offs_c, mask_c, first_row == group_start, group_rows, n_splits, rows_per_split)
    its = (partials_ptr, running_mean_ptr, running_var_ptr, mean_ptr, rstd_ptr)
    mean, rstd = pass_statistics(*its, *which, momentum, eps, TILE.n_channels, 1, BLOCK_S)
    scale = rstd * load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
    bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type)
    if residual_mean_ptr is not None:
        residual_mean, residual_rstd = pass_statistics(
            residual_partials_ptr,
            residual_running_mean_ptr,
            residual_running_var_ptr,
            residual_mean_ptr,
            residual_rstd_ptr,
            *which,
            residual_momentum,
            residual_eps,
            TILE.n_channels,
            1,
            BLOCK_S,
        )
        residual_scale = residual_rstd * load_channel(residual_weight_ptr, offs_c, mask_c, 1.0, acc_type)
        residual_bias = load_channel(residual_bias_ptr, offs_c, mask_c, 0.0, acc_type)

    x_tiles = load_tiles(x_ptr, first_row, n_own, offs_c, mask_c, n_spatial, TILE, REVERSED)
    residual_tiles = load_tiles(residual_ptr, first_row, n_own, offs_c, mask_c, n_spatial, TILE, REVERSED)
    for k in tl.static_range(TILE.n_tiles):
        row = first_row + k * TILE.block_m
        n_left = n_own - k * TILE.block_m
        y = normalize(x_tiles[k].to(acc_type), mean, scale, bias)
        if residual_ptr is not None:
            residual = residual_tiles[k].to(acc_type)
            if residual_mean_ptr is not None:
                residual = normalize(residual, residual_mean, residual_scale, residual_bias)
            y += residual
        if RELU:
            y = relu_and_bits(y, y_ptr, relu_mask_ptr, row, n_left, channel_tile, group, n_rows, rows_per_group, TILE)
        store_tile(y_ptr, y, row, n_left, offs_c, mask_c, n_spatial, TILE)
