"""Batch norm + residual + ReLU with every image read once: a program keeps its tiles in registers across a barrier.

A program has one tile of channels and one split of rows, [N_TILES · BLOCK_M, BLOCK_C], which it holds as a tuple of
tiles in the 16-bit data type. The splits of a channel tile exchange their partial results, wait for each other, and
each merges them for itself, in the same order. So they must all run at once: launched as a cooperative grid
(tiles.py: choose_single_read_tiles). Equations, shapes and arithmetic as in batch_norm_forward.py and
batch_norm_backward.py; channels_last, one group, batch statistics.
"""

import triton
import triton.language as tl

from .batch_norm_backward import input_gradient, recompute_relu_mask, store_gradients, sum_splits
from .batch_norm_forward import (
    UNIT,
    add_differences,
    is_finite,
    load_pivot,
    pass_statistics,
    shift_and_m2,
    store_partial,
)
from .tile_access import (
    bit_offsets,
    channels_of,
    load_channel,
    load_tile,
    normalize,
    pack_bits,
    tile_mask,
    tile_pointers,
    unpack_bits,
    wide,
)

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
def load_tiles(
    ptr, first_row, n_own, offs_c, mask_c, N_CHANNELS: tl.constexpr, N_TILES: tl.constexpr, BLOCK_M: tl.constexpr
):
    """A tuple of N_TILES tiles, all of which are on their way before the first is used."""
    tiles = ()
    for k in tl.static_range(N_TILES):
        row = k * BLOCK_M
        tiles += (load_tile(ptr, first_row + row, n_own - row, offs_c, mask_c, 1, N_CHANNELS, True, BLOCK_M),)
    return tiles


@triton.jit
def store_statistics(
    ptr,
    tiles,
    first_row,
    n_own,
    offs_c,
    mask_c,
    partial_ptrs,
    stride,
    N_CHANNELS: tl.constexpr,
    N_TILES: tl.constexpr,
):
    """Pivot, shift and M2 of the program's rows to the partial results, as `statistics_kernel` stores them (S1)."""
    acc_type: tl.constexpr = partial_ptrs.dtype.element_ty
    BLOCK_M: tl.constexpr = tiles[0].shape[0]
    unit = tl.full([], 1.0, acc_type)
    todo = mask_c
    again = tl.full([], 1, tl.int1)
    while again:
        pivot = load_pivot(ptr, first_row, n_own, offs_c, mask_c, 1, unit, N_CHANNELS, True)
        total = tl.zeros(tiles[0].shape, acc_type)
        squares = tl.zeros(tiles[0].shape, acc_type)
        n_left = afresh(n_own, 0)
        for k in tl.static_range(N_TILES):
            mask = tile_mask(n_left - k * BLOCK_M, mask_c, BLOCK_M)
            total, squares = add_differences(afresh(tiles[k], 0), pivot, unit, mask, total, squares)
        shift, m2 = shift_and_m2(total, squares, n_own)
        store_partial(partial_ptrs, stride, pivot, shift, m2, unit, todo)
        todo = mask_c & (is_finite(m2) == 0)
        again = (tl.max(todo.to(tl.int32), axis=0) > 0) & (unit == 1)
        unit = tl.full([], UNIT, acc_type)


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
    partials_ptr,
    residual_partials_ptr,
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
    N_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = relu(bn(x) + residual) with batch statistics, and all that the forward returns (S1-S4, N1-N3).

    The residual of the add join is read behind the barrier; that of the bn join is held as x is.
    """
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    N_CHANNEL_TILES: tl.constexpr = (N_CHANNELS + BLOCK_C - 1) // BLOCK_C
    ROWS_PER_SPLIT: tl.constexpr = N_TILES * BLOCK_M
    split = tl.program_id(0) // N_CHANNEL_TILES
    first_channel = (tl.program_id(0) % N_CHANNEL_TILES) * BLOCK_C
    offs_c, mask_c = channels_of(tl.program_id(0) % N_CHANNEL_TILES, N_CHANNELS, BLOCK_C)
    first_row = wide(split) * ROWS_PER_SPLIT
    n_own = tl.minimum(n_rows - first_row, ROWS_PER_SPLIT).to(tl.int32)
    partial = split * N_CHANNELS + offs_c
    stride = n_splits * N_CHANNELS

    at = (first_row, n_own, offs_c, mask_c)
    x_tiles = load_tiles(x_ptr, *at, N_CHANNELS, N_TILES, BLOCK_M)
    if residual_mean_ptr is not None:
        residual_tiles = load_tiles(residual_ptr, *at, N_CHANNELS, N_TILES, BLOCK_M)
    store_statistics(x_ptr, x_tiles, *at, partials_ptr + partial, stride, N_CHANNELS, N_TILES)
    if residual_mean_ptr is not None:
        store_statistics(
            residual_ptr,
            residual_tiles,
            *at,
            residual_partials_ptr + partial,
            stride,
            N_CHANNELS,
            N_TILES,
        )

    zero = wait_for_splits(barrier_ptr + tl.program_id(0) % N_CHANNEL_TILES, split, n_splits)
    which = (0, offs_c, mask_c, split == 0, n_rows)
    mean, rstd = pass_statistics(
        partials_ptr,
        running_mean_ptr,
        running_var_ptr,
        mean_ptr,
        rstd_ptr,
        *which,
        ROWS_PER_SPLIT,
        n_splits,
        momentum,
        eps,
        N_CHANNELS,
        N_STEPS,
        BLOCK_M,
        BLOCK_C,
    )
    if residual_mean_ptr is not None:
        residual_mean, residual_rstd = pass_statistics(
            residual_partials_ptr,
            residual_running_mean_ptr,
            residual_running_var_ptr,
            residual_mean_ptr,
            residual_rstd_ptr,
            *which,
            ROWS_PER_SPLIT,
            n_splits,
            residual_momentum,
            residual_eps,
            N_CHANNELS,
            N_STEPS,
            BLOCK_M,
            BLOCK_C,
        )
        residual_scale = residual_rstd * load_channel(residual_weight_ptr, offs_c, mask_c, 1.0, acc_type)
        residual_bias = load_channel(residual_bias_ptr, offs_c, mask_c, 0.0, acc_type)
    scale = rstd * load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
    bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type)

    n_own += zero
    first_row = wide(split + zero) * ROWS_PER_SPLIT
    for k in tl.static_range(N_TILES):
        row = first_row + k * BLOCK_M
        n_left = n_own - k * BLOCK_M
        z = normalize(afresh(x_tiles[k], zero).to(acc_type), mean, scale, bias)
        if residual_mean_ptr is not None:
            residual = afresh(residual_tiles[k], zero).to(acc_type)
            z += normalize(residual, residual_mean, residual_scale, residual_bias)
        elif residual_ptr is not None:
            z += load_tile(residual_ptr, row, n_left, offs_c, mask_c, 1, N_CHANNELS, True, BLOCK_M).to(acc_type)
        # The one rounding. ReLU looks at the rounded value and lets NaN through, as torch does.
        y = z.to(y_ptr.dtype.element_ty)
        if RELU:
            relu_mask = y.to(acc_type) <= 0.0
            if relu_mask_ptr is not None:
                bytes_at, valid = bit_offsets(
                    row, n_left, first_channel, 0, n_rows, None, N_CHANNELS, True, BLOCK_M, BLOCK_C
                )
                tl.store(relu_mask_ptr + bytes_at, pack_bits(relu_mask, True, BLOCK_M, BLOCK_C), mask=valid)
            y = tl.where(relu_mask, 0.0, y)
        pointers = tile_pointers(y_ptr, row, offs_c, 1, N_CHANNELS, True, BLOCK_M)
        tl.store(pointers, y, mask=tile_mask(n_left, mask_c, BLOCK_M))


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
    partials_ptr,
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
    N_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx, the parameters' gradients, and the residual's: dz of the add join, that of the bn join (B1-B4)."""
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    N_CHANNEL_TILES: tl.constexpr = (N_CHANNELS + BLOCK_C - 1) // BLOCK_C
    ROWS_PER_SPLIT: tl.constexpr = N_TILES * BLOCK_M
    N_SUMS: tl.constexpr = 2 if residual_ptr is None else 3
    split = tl.program_id(0) // N_CHANNEL_TILES
    first_channel = (tl.program_id(0) % N_CHANNEL_TILES) * BLOCK_C
    offs_c, mask_c = channels_of(tl.program_id(0) % N_CHANNEL_TILES, N_CHANNELS, BLOCK_C)
    first_row = wide(split) * ROWS_PER_SPLIT
    n_own = tl.minimum(n_rows - first_row, ROWS_PER_SPLIT).to(tl.int32)

    at = (first_row, n_own, offs_c, mask_c)
    dy_tiles = load_tiles(dy_ptr, *at, N_CHANNELS, N_TILES, BLOCK_M)
    x_tiles = load_tiles(x_ptr, *at, N_CHANNELS, N_TILES, BLOCK_M)
    mean = load_channel(mean_ptr, offs_c, mask_c, 0.0, acc_type)
    rstd = load_channel(rstd_ptr, offs_c, mask_c, 0.0, acc_type)
    if RELU and relu_mask_ptr is None:
        scale = rstd * load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
        bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type)
    sum_dz = tl.zeros([BLOCK_M, BLOCK_C], acc_type)
    sum_dz_xhat = tl.zeros([BLOCK_M, BLOCK_C], acc_type)
    if residual_ptr is not None:
        residual_tiles = load_tiles(residual_ptr, *at, N_CHANNELS, N_TILES, BLOCK_M)
        residual_mean = load_channel(residual_mean_ptr, offs_c, mask_c, 0.0, acc_type)
        residual_rstd = load_channel(residual_rstd_ptr, offs_c, mask_c, 0.0, acc_type)
        sum_dz_rhat = tl.zeros([BLOCK_M, BLOCK_C], acc_type)

    dz_tiles = ()
    for k in tl.static_range(N_TILES):
        row = first_row + k * BLOCK_M
        n_left = n_own - k * BLOCK_M
        dz = dy_tiles[k].to(acc_type)
        if dy_alias_ptr is not None:
            # Rounded to the data type, as autograd rounds the sum of two gradients.
            dz += load_tile(dy_alias_ptr, row, n_left, offs_c, mask_c, 1, N_CHANNELS, True, BLOCK_M).to(acc_type)
            dz = dz.to(dy_ptr.dtype.element_ty).to(acc_type)
        x = x_tiles[k].to(acc_type)
        if RELU:
            if relu_mask_ptr is None:
                relu_mask = recompute_relu_mask(x, x_ptr.dtype.element_ty, mean, scale, bias)
            else:
                bytes_at, valid = bit_offsets(
                    row, n_left, first_channel, 0, n_rows, None, N_CHANNELS, True, BLOCK_M, BLOCK_C
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
    sum_stride = n_splits * N_CHANNELS
    partial_ptrs = partials_ptr + split * N_CHANNELS + offs_c
    tl.store(partial_ptrs, tl.sum(sum_dz, axis=0), mask=mask_c)
    tl.store(partial_ptrs + sum_stride, tl.sum(sum_dz_xhat, axis=0), mask=mask_c)
    if residual_ptr is not None:
        tl.store(partial_ptrs + 2 * sum_stride, tl.sum(sum_dz_rhat, axis=0), mask=mask_c)

    zero = wait_for_splits(barrier_ptr + tl.program_id(0) % N_CHANNEL_TILES, split, n_splits)
    weight = load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
    sums = sum_splits(partials_ptr, sum_stride, offs_c, mask_c, n_splits, N_SUMS, N_CHANNELS, N_STEPS, BLOCK_M, BLOCK_C)
    first_mask = mask_c & (split == 0)
    store_gradients(sums, dweight_ptr, dbias_ptr, dresidual_weight_ptr, dresidual_bias_ptr, offs_c, first_mask)
    share = 1 / (tl.full([], 0.0, acc_type) + n_rows)

    n_own += zero
    first_row = wide(split + zero) * ROWS_PER_SPLIT
    for k in tl.static_range(N_TILES):
        row = first_row + k * BLOCK_M
        mask = tile_mask(n_own - k * BLOCK_M, mask_c, BLOCK_M)
        dz = afresh(dz_tiles[k], zero)
        if dz_ptr is not None:
            tl.store(tile_pointers(dz_ptr, row, offs_c, 1, N_CHANNELS, True, BLOCK_M), dz, mask=mask)
        x = afresh(x_tiles[k], zero).to(acc_type)
        dx = input_gradient(dz.to(acc_type), x, mean, rstd, weight, sums[0] * share, sums[1] * share, True)
        tl.store(tile_pointers(dx_ptr, row, offs_c, 1, N_CHANNELS, True, BLOCK_M), dx, mask=mask)

    if residual_ptr is not None:
        weight = load_channel(residual_weight_ptr, offs_c, mask_c, 1.0, acc_type)
        for k in tl.static_range(N_TILES):
            dz = afresh(dz_tiles[k], zero).to(acc_type)
            residual = afresh(residual_tiles[k], zero).to(acc_type)
            dresidual = input_gradient(
                dz, residual, residual_mean, residual_rstd, weight, sums[0] * share, sums[2] * share, True
            )
            pointers = tile_pointers(dresidual_ptr, first_row + k * BLOCK_M, offs_c, 1, N_CHANNELS, True, BLOCK_M)
            tl.store(pointers, dresidual, mask=tile_mask(n_own - k * BLOCK_M, mask_c, BLOCK_M))
