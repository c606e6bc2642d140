"""Batch norm + residual + ReLU, forward: statistics -> combine -> normalize. Equations: README.md in this folder.

x, residual and y are [n_rows, n_channels] in channels_last or NCHW order. Per-channel vectors are [n_channels]; the
mean and rstd of a pass are [n_groups, n_channels] (groups: see tile_access.py). Partial results are
[n_groups + n_splits, n_channels, 2]: the pivot of each group, then shift and M2 of each split. Arithmetic is in fp32,
or in fp64 if x is fp64.

`normalize_kernel` merges the partial results if one group has few splits, otherwise `combine_statistics_kernel`.
"""

import triton
import triton.language as tl

from .tile_access import (
    bit_offsets,
    channels_of,
    divide,
    group_of_rows,
    load_channel,
    load_tiles,
    locate,
    normalize,
    pack_bits,
    part_of_program,
    store_tile,
    tile_mask,
    tile_pointers,
    wait_for_previous_kernel,
    wide,
)

# If a square overflows, statistics are recomputed from x · UNIT. Then 2^31 squares of fp32's maximum fit, and in fp64
# the squares of values up to about 2^600.
UNIT = tl.constexpr(2.0**-100)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def add_differences(x, pivot, unit, mask, total, squares):
    """Add x·unit - pivot and its square to the sums (S1), except for elements outside `mask`."""
    difference = tl.fma(x.to(unit.dtype), tl.broadcast_to(unit, x.shape), tl.broadcast_to(-pivot[None, :], x.shape))
    if mask is not None:
        difference = tl.where(mask, difference, 0.0)
    return total + difference, tl.fma(difference, difference, squares)


@triton.jit
def add_and_range(sum_a, highest_a, lowest_a, sum_b, highest_b, lowest_b):
    return sum_a + sum_b, tl.maximum(highest_a, highest_b), tl.minimum(lowest_a, lowest_b)


@triton.jit
def load_pivot_rows(x_ptr, start, end, offs_c, mask_c, n_spatial, TILE: tl.constexpr):
    """Load rows from all over a group, for `find_pivot`; from a small group some are loaded more than once."""
    N_ROWS: tl.constexpr = 32 if TILE.block_m > 64 else TILE.block_m // 2
    # Multiples of the golden ratio: equal steps, of whole images, would hit the same pixel of every image.
    share = tl.arange(0, N_ROWS) * 40503 % 65536
    row = (start + (share * wide(end - start) >> 16))[:, None]
    if TILE.channels_last:
        offsets = row * TILE.n_channels + offs_c[None, :]
    else:
        offsets = (row // n_spatial * TILE.n_channels + offs_c[None, :]) * n_spatial + row % n_spatial
    return tl.load(x_ptr + offsets, mask=mask_c[None, :], other=0.0)


@triton.jit
def find_pivot(rows, acc_type: tl.constexpr):
    """Return the rows' mean without the highest and the lowest value, [BLOCK_C]; 0 if a value is Inf or NaN.

    This pivot is near the mean of all rows, even with one outlier, so little cancels in M2. In a constant channel it is
    the constant, and M2 is 0.
    """
    N_ROWS: tl.constexpr = rows.shape[0]
    x = rows.to(acc_type) * (1 / N_ROWS)  # so that no sum overflows
    total, highest, lowest = tl.reduce((x, x, x), 0, add_and_range)
    mean = tl.maximum(lowest, tl.minimum(highest, (total - highest - lowest) * (1 / (N_ROWS - 2))))
    return tl.where(is_finite(total), mean * N_ROWS, 0.0)


@triton.jit
def shift_and_m2(total, squares, n_rows):
    """Return shift (mean of `n_rows` rows minus pivot) and M2, [BLOCK_C], from [P, BLOCK_C] sums of differences."""
    total, squares = tl.reduce((total, squares), 0, add_pairs)
    shift = total * divide(1.0, tl.full([], 0.0, total.dtype) + n_rows)
    m2 = tl.fma(-total, shift, squares)
    return shift, tl.where(m2 < 0, 0.0, m2)  # rounding can give less than 0; NaN is kept


@triton.jit
def inverse(unit):
    """Return 1/unit, exact because a unit is 1 or UNIT, a power of two."""
    return tl.where(unit < 1, 1 / UNIT, 1.0)


@triton.jit
def in_units(m2, unit):
    """Return a stored partial M2 in units of 1/unit²."""
    factor = tl.where(m2 < 0, unit * (1 / UNIT), unit)
    return tl.abs(m2) * factor * factor


@triton.jit
def any_overflow(m2, mask_c, unit):
    """Return whether a channel's M2 is not finite and must be recomputed from x·UNIT."""
    return (tl.max((mask_c & (is_finite(m2) == 0)).to(tl.int32), axis=0) > 0) & (unit == 1)


@triton.jit
def split_statistics(x_ptr, start, end, first_row, n_own, offs_c, mask_c, n_spatial, unit, TILE: tl.constexpr):
    """Return [BLOCK_C]: the pivot of the rows from `start` to `end`, and shift and M2 of x·unit over `n_own` rows (S1).

    Each thread has N_TILES loads in flight.
    """
    STEP: tl.constexpr = TILE.n_tiles * TILE.block_m
    whole_rows = n_own // STEP * STEP  # in full steps, which need no mask
    total = tl.zeros([TILE.block_m, TILE.block_c], unit.dtype)
    squares = tl.zeros([TILE.block_m, TILE.block_c], unit.dtype)
    pivot_rows = load_pivot_rows(x_ptr, start, end, offs_c, mask_c, n_spatial, TILE)
    tl.debug_barrier()  # keeps ptxas from moving this load after the others: the pivot would wait for them
    tiles = ()
    for k in tl.static_range(TILE.n_tiles):
        pointers = tile_pointers(x_ptr, first_row + k * TILE.block_m, offs_c, n_spatial, TILE)
        tiles += (tl.load(pointers, mask=(whole_rows > 0) & mask_c[None, :], other=0.0),)
    pivot = find_pivot(pivot_rows, unit.dtype)
    for row in range(STEP, whole_rows + STEP, STEP):
        ahead = ()
        for k in tl.static_range(TILE.n_tiles):  # use a tile, then load the next one into its registers
            total, squares = add_differences(tiles[k], pivot * unit, unit, None, total, squares)
            pointers = tile_pointers(x_ptr, first_row + row + k * TILE.block_m, offs_c, n_spatial, TILE)
            ahead += (tl.load(pointers, mask=(row < whole_rows) & mask_c[None, :], other=0.0),)
        tiles = ahead
    if whole_rows < n_own:
        n_left = n_own - whole_rows
        tiles = load_tiles(x_ptr, first_row + whole_rows, n_left, offs_c, mask_c, n_spatial, TILE)
        for k in tl.static_range(TILE.n_tiles):
            mask = tile_mask(n_left - k * TILE.block_m, mask_c, TILE)
            total, squares = add_differences(tiles[k], pivot * unit, unit, mask, total, squares)
    shift, m2 = shift_and_m2(total, squares, n_own)
    return pivot, shift, m2


@triton.jit
def store_pair(partial_ptrs, shift, m2, mask):
    tl.store(partial_ptrs[:, None] + tl.arange(0, 2)[None, :], tl.join(shift, m2), mask=mask[:, None])


@triton.jit
def store_partial(partial_ptrs, shift, m2, unit, mask_c):
    """Store a split's shift and M2 of x·unit; return whether to recompute them from x·UNIT.

    The second time, store only the channels whose M2 was not finite. A negative M2 is in units of 1/UNIT².
    """
    is_again = tl.where(unit < 1, 1, 0) > 0  # compares integers: in the interpreter, comparing fp32 gives fp32
    stored = tl.load(partial_ptrs + 1, mask=mask_c & is_again, other=float("inf"))
    store_pair(partial_ptrs, shift * inverse(unit), tl.where(unit < 1, -m2, m2), mask_c & (is_finite(stored) == 0))
    return any_overflow(m2, mask_c, unit)


@triton.jit
def statistics_kernel(
    x_ptr,
    partials_ptr,
    n_rows,
    n_spatial,
    rows_per_group,
    rows_per_split,
    n_groups,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute shift and centered M2 of one split of rows about its group's pivot; the first split stores the pivot."""
    wait_for_previous_kernel(PDL)
    acc_type: tl.constexpr = partials_ptr.dtype.element_ty
    split, channel_tile = part_of_program(TILE)
    offs_c, mask_c = channels_of(channel_tile, TILE.n_channels, TILE.block_c)
    group, first_row, n_own = locate(split, rows_per_split, n_rows, rows_per_group)
    start, end = group_of_rows(group, n_rows, rows_per_group)
    pivot_ptrs = partials_ptr + 2 * (wide(group) * TILE.n_channels + offs_c)
    partial_ptrs = partials_ptr + 2 * (wide(n_groups + split) * TILE.n_channels + offs_c)

    unit = tl.full([], 1.0, acc_type)
    again = tl.full([], 1, tl.int1)
    while again:  # twice if a square overflows, or x holds Inf or NaN
        rows = (first_row, n_own, offs_c, mask_c, n_spatial, unit)
        pivot, shift, m2 = split_statistics(x_ptr, start, end, *rows, TILE)
        store_pair(pivot_ptrs, pivot, m2, mask_c & (first_row == start))
        again = store_partial(partial_ptrs, shift, m2, unit, mask_c)
        unit = tl.full([], UNIT, acc_type)


@triton.jit
def merge_splits(
    partials_ptr,
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
    """Return [BLOCK_C] shift and M2 of x·unit over a group's rows (S2).

    Each of `n_steps` steps merges BLOCK_S splits. A constant 1 compiles to no loop, so no load waits for another.
    """
    full_rows = tl.full([], 0.0, unit.dtype) + rows_per_split
    last_rows = tl.full([], 0.0, unit.dtype) + (n_rows - wide(n_splits - 1) * rows_per_split)
    total = tl.zeros([BLOCK_S, offs_c.shape[0]], unit.dtype)
    squares = tl.zeros([BLOCK_S, offs_c.shape[0]], unit.dtype)
    for step in range(0, n_steps):
        offs_s = step * BLOCK_S + tl.arange(0, BLOCK_S)  # 32-bit offsets: there are few partial results
        mask = (offs_s < n_splits)[:, None] & mask_c[None, :]
        offsets = offs_s[:, None] * N_CHANNELS + offs_c[None, :]
        pointers = partials_ptr + (2 * offsets[:, :, None] + tl.arange(0, 2)[None, None, :])
        shift, m2 = tl.split(tl.load(pointers, mask=mask[:, :, None], other=0.0))
        m2 = in_units(m2, unit)
        rows = tl.where(offs_s < n_splits - 1, full_rows, tl.where(offs_s < n_splits, last_rows, 0.0))[:, None]
        shift *= unit
        total += rows * shift
        squares += tl.fma(rows * shift, shift, m2)
    return shift_and_m2(total, squares, n_rows)


@triton.jit
def group_statistics(
    pivot_ptr,
    partials_ptr,
    offs_c,
    mask_c,
    n_rows,
    n_splits,
    rows_per_split,
    N_CHANNELS: tl.constexpr,
    n_steps,
    BLOCK_S: tl.constexpr,
):
    """Return [BLOCK_C] mean of a group, biased variance in units of 1/unit², and unit: 1 unless M2 overflows."""
    acc_type: tl.constexpr = partials_ptr.dtype.element_ty
    pivot = load_channel(pivot_ptr, 2 * offs_c, mask_c, 0.0, acc_type)
    mean = tl.zeros(offs_c.shape, acc_type)
    var = tl.zeros(offs_c.shape, acc_type)
    units = tl.full(offs_c.shape, 1.0, acc_type)
    unit = tl.full([], 1.0, acc_type)
    todo = mask_c
    again = tl.full([], 1, tl.int1)
    splits = (offs_c, mask_c, n_rows, n_splits, rows_per_split)
    while again:
        shift, m2 = merge_splits(partials_ptr, *splits, unit, N_CHANNELS, n_steps, BLOCK_S)
        mean = tl.where(todo, pivot + shift * inverse(unit), mean)
        var = tl.where(todo, m2 * divide(1.0, tl.full([], 0.0, acc_type) + n_rows), var)
        units = tl.where(todo, unit, units)
        again = any_overflow(m2, mask_c, unit)
        todo = todo & (is_finite(m2) == 0)
        unit = tl.full([], UNIT, acc_type)
    return mean, var, units


@triton.jit
def inverse_std(var, eps, units):
    """Return 1/sqrt(variance + eps) for a variance in units of 1/units². Root and quotient are correctly rounded."""
    x = var + tl.full([], eps, var.dtype) * units * units
    if var.dtype == tl.float64:  # where tl.sqrt is correctly rounded, too
        std = tl.sqrt(x)
    else:
        std = tl.sqrt_rn(x)
    return divide(units, std)


@triton.jit
def updated_running(running_mean, running_var, mean, var, units, n_rows, momentum):
    """Return the running statistics after one more batch (S3); `var` is biased and in units of 1/units²."""
    share = tl.full([], momentum, mean.dtype)
    rest = tl.full([], 1.0 - momentum, mean.dtype)
    count = tl.full([], 0.0, var.dtype) + n_rows
    unbiased = var * divide(count, count - 1) * inverse(units) * inverse(units)
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
    """Merge the partial results into mean and rstd of the pass, and update the running statistics.

    Each group updates them like a batch of its own, in order and in the accumulation type (S3). A full group has
    `group_splits` splits. `var_ptr` receives the biased variance; in fp64 the variance of huge values fits.
    """
    wait_for_previous_kernel(PDL)
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    offs_c, mask_c = channels_of(tl.program_id(0), N_CHANNELS, BLOCK_C)
    running_mean = load_channel(running_mean_ptr, offs_c, mask_c, 0.0, acc_type)
    running_var = load_channel(running_var_ptr, offs_c, mask_c, 0.0, acc_type)
    for group in range(0, n_groups):
        first_split = wide(group) * group_splits
        start, end = group_of_rows(group, n_rows, rows_per_group)
        own_splits = tl.minimum(n_splits - first_split, group_splits).to(tl.int32)
        splits = (offs_c, mask_c, end - start, own_splits, rows_per_split)
        pivot_ptr = partials_ptr + 2 * wide(group) * N_CHANNELS
        group_partials_ptr = partials_ptr + 2 * (n_groups + first_split) * N_CHANNELS
        mean, var, units = group_statistics(pivot_ptr, group_partials_ptr, *splits, N_CHANNELS, N_STEPS, BLOCK_S)
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
    """Return [BLOCK_C] mean and rstd: from partial results if given, else from running statistics if given, else read.

    If they are not read, the first program of each group and channel tile stores them. If they come from partial
    results, it also updates the running statistics.
    """
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    group_offs_c = group * N_CHANNELS + offs_c
    first_mask = mask_c & is_first
    if partials_ptr is not None:
        splits = (offs_c, mask_c, n_rows, n_splits, rows_per_split)
        mean, var, units = group_statistics(
            partials_ptr, partials_ptr + 2 * N_CHANNELS, *splits, N_CHANNELS, n_steps, BLOCK_S
        )
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
    """Return relu(z) in the data type (N3), and store ReLU's bits if `relu_mask_ptr` is given.

    This is the only rounding. ReLU tests the rounded value and passes NaN on, as in torch.
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
    """Compute y = relu(bn(x) + residual) (N1-N3): no residual, a residual, or one with its own batch norm.

    With a residual and ReLU, ReLU's bits are stored. Without a residual the backward recomputes them from x, which
    moves fewer bytes than a mask. If two norms share running statistics, both or neither must use batch statistics: a
    program that updates running statistics does not wait until others have read them.
    """
    wait_for_previous_kernel(PDL)
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    part, channel_tile = part_of_program(TILE, REVERSED)
    offs_c, mask_c = channels_of(channel_tile, TILE.n_channels, TILE.block_c)
    group, first_row, n_own = locate(part, TILE.n_tiles * TILE.block_m, n_rows, rows_per_group)
    group_start, group_end = group_of_rows(group, n_rows, rows_per_group)
    group_rows = group_end - group_start

    common = (group, offs_c, mask_c, first_row == group_start, group_rows, n_splits, rows_per_split)
    norm = (partials_ptr, running_mean_ptr, running_var_ptr, mean_ptr, rstd_ptr)
    mean, rstd = pass_statistics(*norm, *common, momentum, eps, TILE.n_channels, 1, BLOCK_S)
    scale = rstd * load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
    bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type)
    if residual_mean_ptr is not None:
        residual_mean, residual_rstd = pass_statistics(
            residual_partials_ptr,
            residual_running_mean_ptr,
            residual_running_var_ptr,
            residual_mean_ptr,
            residual_rstd_ptr,
            *common,
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
