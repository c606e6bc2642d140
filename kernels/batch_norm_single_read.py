"""Batch norm + residual + ReLU with every image read once: a program keeps its tiles in registers across a barrier.

A program has one tile of channels and one split of rows, [N_TILES · BLOCK_M, BLOCK_C], which it holds as a tuple of
tiles in the 16-bit data type. The splits of a channel tile exchange their partial results, wait for each other, and
each merges them for itself, in the same order. So they must all run at once: launched as a cooperative grid
(tiles.py: choose_single_read_tiles). Equations, shapes and arithmetic as in batch_norm_forward.py and
batch_norm_backward.py; channels_last, one group, batch statistics.
"""

import triton
import triton.language as tl

from .batch_norm_backward import input_gradient, recompute_relu_mask, sum_splits
from .batch_norm_forward import UNIT, is_finite, load_pivot, merge_lanes, merge_splits
from .tile_access import bit_offsets, load_channel, normalize, pack_bits, tile_offsets, unpack_bits

TOP_BIT = tl.constexpr(-(2**31))  # of an int32


@triton.jit
def wait_for_splits(barrier_ptr, split, n_splits):
    """Returns once all splits of a channel tile have come here; then each sees what the others stored before.

    `barrier_ptr`: one int32 of the channel tile, all but its top bit 0. The arrivals add up to the top bit, which they
    so flip, and leave the rest 0 for the next launch, of whatever number of splits. That rest is returned: a 0 of which
    no compiler knows.
    """
    tl.debug_barrier()  # the one thread that arrives does so behind the stores of all
    arrival = tl.where(split == 0, TOP_BIT - (n_splits - 1), 1)
    before = tl.atomic_add(barrier_ptr, arrival, sem="acq_rel", scope="gpu")
    now = before
    while ((now ^ before) & TOP_BIT) == 0:
        # Acquiring empties this multiprocessor's L1, so that plain loads then see what others have stored.
        now = tl.atomic_add(barrier_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return now & ~TOP_BIT


@triton.jit
def afresh(x, zero):
    """x, in the registers where it lies, which the compilers take for another value than x.

    Else they would keep what they once made of x, fp32 values, through a loop or across the barrier: twice the
    registers. `zero`: the barrier's, which ptxas does not know either; or, where LLVM alone must not know, a literal,
    with which ptxas drops the instruction.
    """
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    zero = tl.cast(zero, tl.int16 if BITS == 16 else tl.int32)
    return tl.inline_asm_elementwise(
        "xor.b32 $0, $1, $2;", "=r,r,r", [x, zero], dtype=x.dtype, is_pure=False, pack=32 // BITS
    )


@triton.jit
def tile_mask(k, n_own, mask_c, BLOCK_M: tl.constexpr):
    """Which elements of a program's k-th tile are its own."""
    return (tl.arange(0, BLOCK_M) + k * BLOCK_M < n_own)[:, None] & mask_c[None, :]


@triton.jit
def load_tiles(ptrs, n_own, mask_c, TILE_STRIDE: tl.constexpr, N_TILES: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tuple of N_TILES tiles, all of which are on their way before the first is used."""
    tiles = ()
    for k in tl.static_range(N_TILES):
        tiles += (tl.load(ptrs + k * TILE_STRIDE, mask=tile_mask(k, n_own, mask_c, BLOCK_M), other=0.0),)
    return tiles


@triton.jit
def tile_statistics(tiles, n_own, pivot, unit, mask_c, N_TILES: tl.constexpr):
    """[BLOCK_C] mean and M2 of (x - pivot)·unit: Welford in every lane, then merged (S1, S2)."""
    BLOCK_M: tl.constexpr = tiles[0].shape[0]
    mean = tl.zeros(tiles[0].shape, unit.dtype)
    m2 = tl.zeros(tiles[0].shape, unit.dtype)
    pivot *= unit
    n_own = afresh(n_own, 0)
    for k in tl.static_range(N_TILES):
        x = afresh(tiles[k], 0).to(unit.dtype) * unit - pivot[None, :]
        x = tl.where(tile_mask(k, n_own, mask_c, BLOCK_M), x, mean)  # a lane without a row keeps its mean
        delta = x - mean
        mean += tl.where(is_finite(mean), delta * (1 / (k + 1)), x)
        m2 += delta * (x - mean)
    count = ((n_own - tl.arange(0, BLOCK_M) + BLOCK_M - 1) // BLOCK_M).to(unit.dtype)
    _, mean, lost, m2 = merge_lanes(count, mean, m2)
    return mean + lost, m2


@triton.jit
def store_statistics(tiles, n_own, pivot, partial_mean_ptr, partial_m2_ptr, partial, mask_c, N_TILES: tl.constexpr):
    """Mean and M2 of the program's rows to the partials, as `statistics_kernel` stores them."""
    acc_type: tl.constexpr = partial_mean_ptr.dtype.element_ty
    todo = mask_c.to(tl.int32)
    rescue = tl.full([], 0, tl.int32)  # 1 where a square has overflowed, or x holds Inf or NaN
    while tl.max(todo, axis=0) > 0:
        unit = tl.where(rescue > 0, UNIT, 1.0).to(acc_type)
        mean, m2 = tile_statistics(tiles, n_own, pivot, unit, mask_c, N_TILES)
        done = todo & (is_finite(m2).to(tl.int32) | rescue)
        tl.store(partial_mean_ptr + partial, mean / unit, mask=done > 0)
        tl.store(partial_m2_ptr + partial, tl.where(rescue > 0, -m2, m2), mask=done > 0)
        todo -= done
        rescue = 1


@triton.jit
def merge_statistics(
    x_ptr,
    partial_mean_ptr,
    partial_m2_ptr,
    running_mean_ptr,
    running_var_ptr,
    mean_ptr,
    rstd_ptr,
    split,
    offs_c,
    mask_c,
    n_rows,
    n_channels,
    n_splits,
    rows_per_split,
    momentum,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_C] mean and rstd of the pass; split 0 stores them and updates the running statistics (S4)."""
    acc_type: tl.constexpr = partial_mean_ptr.dtype.element_ty
    epsilon = tl.full([], eps, acc_type)
    mean = tl.zeros([BLOCK_C], acc_type)
    rstd = tl.full([BLOCK_C], -1.0, acc_type)  # negative where there is none yet
    unbiased = tl.zeros([BLOCK_C], acc_type)
    rescue = tl.full([], 0, tl.int32)
    while tl.max((mask_c & (rstd < 0.0)).to(tl.int32), axis=0) > 0:
        unit = tl.where(rescue > 0, UNIT, 1.0).to(acc_type)
        part_mean, lost, m2 = merge_splits(
            partial_mean_ptr,
            partial_m2_ptr,
            offs_c,
            n_rows,
            n_channels,
            n_splits,
            rows_per_split,
            unit,
            BLOCK_M,
            BLOCK_C,
        )
        # Loaded again, behind the merge: held in registers it would cost two tiles.
        pivot = load_pivot(x_ptr, 0, n_rows, offs_c, n_channels, 1, True, 1, acc_type)
        done = (rstd < 0.0) & (is_finite(m2) | (rescue > 0))
        mean = tl.where(done, (part_mean / unit + pivot) + lost / unit, mean)
        rstd = tl.where(done, unit / tl.sqrt(m2 / n_rows + epsilon * unit * unit), rstd)
        unbiased = tl.where(done, m2 / (n_rows - 1) / unit / unit, unbiased)
        rescue = 1
    mask = mask_c & (split == 0)
    if running_mean_ptr is not None:
        new = tl.full([], momentum, acc_type)
        old = tl.full([], 1.0 - momentum, acc_type)
        running_mean = tl.load(running_mean_ptr + offs_c, mask=mask, other=0.0).to(acc_type)
        running_var = tl.load(running_var_ptr + offs_c, mask=mask, other=0.0).to(acc_type)
        tl.store(running_mean_ptr + offs_c, new * mean + old * running_mean, mask=mask)
        tl.store(running_var_ptr + offs_c, new * unbiased + old * running_var, mask=mask)
    tl.store(mean_ptr + offs_c, mean, mask=mask)
    tl.store(rstd_ptr + offs_c, rstd, mask=mask)
    return mean, rstd


@triton.jit
def single_read_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    residual_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    residual_running_mean_ptr,
    residual_running_var_ptr,
    barrier_ptr,
    partial_mean_ptr,
    partial_m2_ptr,
    partial_residual_mean_ptr,
    partial_residual_m2_ptr,
    y_ptr,
    relu_mask_ptr,
    mean_ptr,
    rstd_ptr,
    residual_mean_ptr,
    residual_rstd_ptr,
    n_rows,
    n_splits,
    momentum: tl.float64,
    eps: tl.float64,
    residual_momentum: tl.float64,
    residual_eps: tl.float64,
    RELU: tl.constexpr,
    N_CHANNELS: tl.constexpr,
    N_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = relu(bn(x) + residual) with batch statistics, and all that the forward returns (S1-S4, N1-N3).

    The residual of the add join is read behind the barrier; that of the bn join is held as x is.
    """
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    N_CHANNEL_TILES: tl.constexpr = (N_CHANNELS + BLOCK_C - 1) // BLOCK_C
    ROWS_PER_SPLIT: tl.constexpr = N_TILES * BLOCK_M
    TILE_STRIDE: tl.constexpr = BLOCK_M * N_CHANNELS
    split = tl.program_id(0) // N_CHANNEL_TILES
    first_channel = (tl.program_id(0) % N_CHANNEL_TILES) * BLOCK_C
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < N_CHANNELS
    first_row = split.to(tl.int64) * ROWS_PER_SPLIT
    n_own = tl.minimum(n_rows - first_row, ROWS_PER_SPLIT).to(tl.int32)
    partial = split * N_CHANNELS + offs_c

    offsets = tile_offsets(first_row, offs_c, N_CHANNELS, 1, True, BLOCK_M)
    x_tiles = load_tiles(x_ptr + offsets, n_own, mask_c, TILE_STRIDE, N_TILES, BLOCK_M)
    pivot = load_pivot(x_ptr, 0, n_rows, offs_c, N_CHANNELS, 1, True, 1, acc_type)
    if residual_mean_ptr is not None:
        residual_tiles = load_tiles(residual_ptr + offsets, n_own, mask_c, TILE_STRIDE, N_TILES, BLOCK_M)
        residual_pivot = load_pivot(residual_ptr, 0, n_rows, offs_c, N_CHANNELS, 1, True, 1, acc_type)
    store_statistics(x_tiles, n_own, pivot, partial_mean_ptr, partial_m2_ptr, partial, mask_c, N_TILES)
    if residual_mean_ptr is not None:
        store_statistics(
            residual_tiles,
            n_own,
            residual_pivot,
            partial_residual_mean_ptr,
            partial_residual_m2_ptr,
            partial,
            mask_c,
            N_TILES,
        )

    zero = wait_for_splits(barrier_ptr + tl.program_id(0) % N_CHANNEL_TILES, split, n_splits)
    mean, rstd = merge_statistics(
        x_ptr,
        partial_mean_ptr,
        partial_m2_ptr,
        running_mean_ptr,
        running_var_ptr,
        mean_ptr,
        rstd_ptr,
        split,
        offs_c,
        mask_c,
        n_rows,
        N_CHANNELS,
        n_splits,
        ROWS_PER_SPLIT,
        momentum,
        eps,
        BLOCK_M,
        BLOCK_C,
    )
    if residual_mean_ptr is not None:
        residual_mean, residual_rstd = merge_statistics(
            residual_ptr,
            partial_residual_mean_ptr,
            partial_residual_m2_ptr,
            residual_running_mean_ptr,
            residual_running_var_ptr,
            residual_mean_ptr,
            residual_rstd_ptr,
            split,
            offs_c,
            mask_c,
            n_rows,
            N_CHANNELS,
            n_splits,
            ROWS_PER_SPLIT,
            residual_momentum,
            residual_eps,
            BLOCK_M,
            BLOCK_C,
        )
        residual_scale = residual_rstd * load_channel(residual_weight_ptr, offs_c, mask_c, 1.0, acc_type)
        residual_bias = load_channel(residual_bias_ptr, offs_c, mask_c, 0.0, acc_type)
    scale = rstd * load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
    bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type)

    n_own += zero
    first_row = (split + zero).to(tl.int64) * ROWS_PER_SPLIT
    offsets = tile_offsets(first_row, offs_c, N_CHANNELS, 1, True, BLOCK_M)
    for k in tl.static_range(N_TILES):
        mask = tile_mask(k, n_own, mask_c, BLOCK_M)
        z = normalize(afresh(x_tiles[k], zero).to(acc_type), mean, scale, bias)
        if residual_mean_ptr is not None:
            residual = afresh(residual_tiles[k], zero).to(acc_type)
            z += normalize(residual, residual_mean, residual_scale, residual_bias)
        elif residual_ptr is not None:
            z += tl.load(residual_ptr + offsets + k * TILE_STRIDE, mask=mask, other=0.0).to(acc_type)
        # The one rounding. ReLU looks at the rounded value and lets NaN through, as torch does.
        y = z.to(y_ptr.dtype.element_ty)
        if RELU:
            relu_mask = y.to(acc_type) <= 0.0
            if relu_mask_ptr is not None:
                bytes_at, valid = bit_offsets(
                    first_row + k * BLOCK_M, first_channel, 0, n_rows, N_CHANNELS, None, True, BLOCK_M, BLOCK_C
                )
                tl.store(relu_mask_ptr + bytes_at, pack_bits(relu_mask, True, BLOCK_M, BLOCK_C), mask=valid)
            y = tl.where(relu_mask, 0.0, y)
        tl.store(y_ptr + offsets + k * TILE_STRIDE, y, mask=mask)


@triton.jit
def single_read_backward_kernel(
    dy_ptr,
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
    residual_weight_ptr,
    barrier_ptr,
    partial_dz_ptr,
    partial_dz_xhat_ptr,
    partial_dz_rhat_ptr,
    dz_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    dresidual_weight_ptr,
    dresidual_bias_ptr,
    n_rows,
    n_splits,
    RELU: tl.constexpr,
    N_CHANNELS: tl.constexpr,
    N_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx, the parameters' gradients, and the residual's: dz of the add join, that of the bn join (B1-B4)."""
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    N_CHANNEL_TILES: tl.constexpr = (N_CHANNELS + BLOCK_C - 1) // BLOCK_C
    ROWS_PER_SPLIT: tl.constexpr = N_TILES * BLOCK_M
    TILE_STRIDE: tl.constexpr = BLOCK_M * N_CHANNELS
    split = tl.program_id(0) // N_CHANNEL_TILES
    first_channel = (tl.program_id(0) % N_CHANNEL_TILES) * BLOCK_C
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < N_CHANNELS
    first_row = split.to(tl.int64) * ROWS_PER_SPLIT
    n_own = tl.minimum(n_rows - first_row, ROWS_PER_SPLIT).to(tl.int32)
    partial = split * N_CHANNELS + offs_c

    offsets = tile_offsets(first_row, offs_c, N_CHANNELS, 1, True, BLOCK_M)
    dy_tiles = load_tiles(dy_ptr + offsets, n_own, mask_c, TILE_STRIDE, N_TILES, BLOCK_M)
    x_tiles = load_tiles(x_ptr + offsets, n_own, mask_c, TILE_STRIDE, N_TILES, BLOCK_M)
    mean = load_channel(mean_ptr, offs_c, mask_c, 0.0, acc_type)
    rstd = load_channel(rstd_ptr, offs_c, mask_c, 0.0, acc_type)
    if RELU and relu_mask_ptr is None:
        scale = rstd * load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
        bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type)
    sum_dz = tl.zeros([BLOCK_M, BLOCK_C], acc_type)
    sum_dz_xhat = tl.zeros([BLOCK_M, BLOCK_C], acc_type)
    if residual_ptr is not None:
        residual_tiles = load_tiles(residual_ptr + offsets, n_own, mask_c, TILE_STRIDE, N_TILES, BLOCK_M)
        residual_mean = load_channel(residual_mean_ptr, offs_c, mask_c, 0.0, acc_type)
        residual_rstd = load_channel(residual_rstd_ptr, offs_c, mask_c, 0.0, acc_type)
        sum_dz_rhat = tl.zeros([BLOCK_M, BLOCK_C], acc_type)

    dz_tiles = ()
    for k in tl.static_range(N_TILES):
        dz = dy_tiles[k].to(acc_type)
        if dy_alias_ptr is not None:
            # Rounded to the data type, as autograd rounds the sum of two gradients.
            mask = tile_mask(k, n_own, mask_c, BLOCK_M)
            dz += tl.load(dy_alias_ptr + offsets + k * TILE_STRIDE, mask=mask, other=0.0).to(acc_type)
            dz = dz.to(dy_ptr.dtype.element_ty).to(acc_type)
        x = x_tiles[k].to(acc_type)
        if RELU:
            if relu_mask_ptr is None:
                relu_mask = recompute_relu_mask(x, x_ptr.dtype.element_ty, mean, scale, bias)
            else:
                bytes_at, valid = bit_offsets(
                    first_row + k * BLOCK_M, first_channel, 0, n_rows, N_CHANNELS, None, True, BLOCK_M, BLOCK_C
                )
                packed = tl.load(relu_mask_ptr + bytes_at, mask=valid, other=0)
                relu_mask = unpack_bits(packed, True, BLOCK_M, BLOCK_C)
            dz = tl.where(relu_mask, 0.0, dz)
        dz_tiles += (afresh(dz.to(dy_ptr.dtype.element_ty), 0),)
        sum_dz += dz
        sum_dz_xhat += dz * ((x - mean[None, :]) * rstd[None, :])
        if residual_ptr is not None:
            residual = residual_tiles[k].to(acc_type)
            sum_dz_rhat += dz * ((residual - residual_mean[None, :]) * residual_rstd[None, :])
    tl.store(partial_dz_ptr + partial, tl.sum(sum_dz, axis=0), mask=mask_c)
    tl.store(partial_dz_xhat_ptr + partial, tl.sum(sum_dz_xhat, axis=0), mask=mask_c)
    if residual_ptr is not None:
        tl.store(partial_dz_rhat_ptr + partial, tl.sum(sum_dz_rhat, axis=0), mask=mask_c)

    zero = wait_for_splits(barrier_ptr + tl.program_id(0) % N_CHANNEL_TILES, split, n_splits)
    weight = load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
    dbias = sum_splits(partial_dz_ptr, offs_c, mask_c, N_CHANNELS, n_splits, BLOCK_M, BLOCK_C)
    dweight = sum_splits(partial_dz_xhat_ptr, offs_c, mask_c, N_CHANNELS, n_splits, BLOCK_M, BLOCK_C)
    mask_split_0 = mask_c & (split == 0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + offs_c, dweight, mask=mask_split_0)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs_c, dbias, mask=mask_split_0)

    n_own += zero
    first_row = (split + zero).to(tl.int64) * ROWS_PER_SPLIT
    offsets = tile_offsets(first_row, offs_c, N_CHANNELS, 1, True, BLOCK_M)
    for k in tl.static_range(N_TILES):
        mask = tile_mask(k, n_own, mask_c, BLOCK_M)
        dz = afresh(dz_tiles[k], zero)
        if dz_ptr is not None:
            tl.store(dz_ptr + offsets + k * TILE_STRIDE, dz, mask=mask)
        x = afresh(x_tiles[k], zero).to(acc_type)
        dx = input_gradient(dz.to(acc_type), x, mean, rstd, weight, dbias, dweight, n_rows, True)
        tl.store(dx_ptr + offsets + k * TILE_STRIDE, dx, mask=mask)

    if residual_ptr is not None:
        weight = load_channel(residual_weight_ptr, offs_c, mask_c, 1.0, acc_type)
        dweight = sum_splits(partial_dz_rhat_ptr, offs_c, mask_c, N_CHANNELS, n_splits, BLOCK_M, BLOCK_C)
        if dresidual_weight_ptr is not None:
            tl.store(dresidual_weight_ptr + offs_c, dweight, mask=mask_split_0)
        if dresidual_bias_ptr is not None:
            tl.store(dresidual_bias_ptr + offs_c, dbias, mask=mask_split_0)
        for k in tl.static_range(N_TILES):
            dresidual = input_gradient(
                afresh(dz_tiles[k], zero).to(acc_type),
                afresh(residual_tiles[k], zero).to(acc_type),
                residual_mean,
                residual_rstd,
                weight,
                dbias,
                dweight,
                n_rows,
                True,
            )
            mask = tile_mask(k, n_own, mask_c, BLOCK_M)
            tl.store(dresidual_ptr + offsets + k * TILE_STRIDE, dresidual, mask=mask)
