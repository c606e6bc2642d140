"""Batch norm + residual + ReLU that reads each image once: programs keep their tiles in registers across a barrier.

A program has one tile of channels and one split of rows, [N_TILES · BLOCK_M, BLOCK_C], and holds it as a tuple of tiles
in the 16-bit data type. The splits of a channel tile store their partial results and wait for each other; then each
program merges all of them in the same order. All programs must run at the same time, so the grid is cooperative
(tiles.py: choose_single_read_tiles). Tensors are channels_last, in one group, with batch statistics. Equations, shapes
and arithmetic are as in batch_norm_forward.py and batch_norm_backward.py.
"""

import triton
import triton.language as tl

from .batch_norm_backward import (
    input_gradient,
    preactivation_gradient,
    store_gradients,
    store_sums,
    sum_splits,
    x_hat,
)
from .batch_norm_forward import (
    UNIT,
    add_differences,
    find_pivot,
    load_pivot_rows,
    pass_statistics,
    relu_and_bits,
    shift_and_m2,
    store_pair,
    store_partial,
)
from .tile_access import (
    channels_of,
    load_bits,
    load_channel,
    load_tile,
    load_tiles,
    normalize,
    part_of_program,
    store_tile,
    tile_mask,
    wide,
)

TOP_BIT = tl.constexpr(-(2**31))  # of an int32


@triton.jit
def wait_for_splits(barrier_ptr, split, n_splits):
    """Wait until all splits of a channel tile have arrived; then each sees the others' stores.

    `barrier_ptr` points to an int32 in which only the top bit may be set. The arrivals add up to the top bit: they flip
    it and leave the other bits 0 for the next launch. Return those other bits, a 0 that no compiler can predict.
    """
    tl.debug_barrier()  # all threads have stored before one of them arrives
    arrival = tl.where(split == 0, TOP_BIT - (n_splits - 1), 1)
    before = tl.atomic_add(barrier_ptr, arrival, sem="acq_rel", scope="gpu")
    now = before
    while ((now ^ before) & TOP_BIT) == 0:
        # Acquiring invalidates this multiprocessor's L1 cache, so that plain loads see the others' stores.
        now = tl.atomic_add(barrier_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return now & ~TOP_BIT


@triton.jit
def afresh(x, zero):
    """Return x unchanged, as a value that the compilers treat as new.

    Otherwise they would keep its fp32 conversion through a loop or across the barrier, in twice the registers. `zero`
    is the barrier's, which ptxas cannot predict, or a literal. A literal hides x only from LLVM: ptxas drops the xor.
    """
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    zero = tl.cast(zero, tl.int16 if BITS == 16 else tl.int32)
    return tl.inline_asm_elementwise(
        "xor.b32 $0, $1, $2;", "=r,r,r", [x, zero], dtype=x.dtype, is_pure=False, pack=32 // BITS
    )


@triton.jit
def store_statistics(x_ptr, tiles, split, n_own, n_rows, offs_c, mask_c, partials_ptr, TILE: tl.constexpr):
    """Store shift and M2 of the program's rows, as `statistics_kernel` does; the first split stores the pivot (S1)."""
    acc_type: tl.constexpr = partials_ptr.dtype.element_ty
    partial_ptrs = partials_ptr + 2 * ((1 + split) * TILE.n_channels + offs_c)
    pivot_rows = load_pivot_rows(x_ptr, 0, n_rows, offs_c, mask_c, 1, TILE)
    pivot = find_pivot(pivot_rows, acc_type)
    store_pair(partials_ptr + 2 * offs_c, pivot, pivot, mask_c & (split == 0))
    unit = tl.full([], 1.0, acc_type)
    again = tl.full([], 1, tl.int1)
    while again:
        total = tl.zeros([TILE.block_m, TILE.block_c], acc_type)
        squares = tl.zeros([TILE.block_m, TILE.block_c], acc_type)
        n_left = afresh(n_own, 0)
        for k in tl.static_range(TILE.n_tiles):
            mask = tile_mask(n_left - k * TILE.block_m, mask_c, TILE)
            total, squares = add_differences(afresh(tiles[k], 0), pivot * unit, unit, mask, total, squares)
        shift, m2 = shift_and_m2(total, squares, n_own)
        again = store_partial(partial_ptrs, shift, m2, unit, mask_c)
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
    TILE: tl.constexpr,
):
    """Compute y = relu(bn(x) + residual) with batch statistics, and the forward's other results (S1-S3, N1-N3).

    The residual is read after the barrier in the add join; in the bn join it is held in registers, like x.
    """
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    ROWS_PER_SPLIT: tl.constexpr = TILE.n_tiles * TILE.block_m
    split, channel_tile = part_of_program(TILE)
    offs_c, mask_c = channels_of(channel_tile, TILE.n_channels, TILE.block_c)
    first_row = wide(split) * ROWS_PER_SPLIT
    n_own = tl.minimum(n_rows - first_row, ROWS_PER_SPLIT).to(tl.int32)

    at = (first_row, n_own, offs_c, mask_c, 1)
    x_tiles = load_tiles(x_ptr, *at, TILE)
    if residual_mean_ptr is not None:
        residual_tiles = load_tiles(residual_ptr, *at, TILE)
    rows = (split, n_own, n_rows, offs_c, mask_c)
    store_statistics(x_ptr, x_tiles, *rows, partials_ptr, TILE)
    if residual_mean_ptr is not None:
        store_statistics(residual_ptr, residual_tiles, *rows, residual_partials_ptr, TILE)

    zero = wait_for_splits(barrier_ptr + channel_tile, split, n_splits)
    n_steps = tl.cdiv(n_splits, TILE.block_m)
    common = (0, offs_c, mask_c, split == 0, n_rows, n_splits, ROWS_PER_SPLIT)
    norm = (partials_ptr, running_mean_ptr, running_var_ptr, mean_ptr, rstd_ptr)
    mean, rstd = pass_statistics(*norm, *common, momentum, eps, TILE.n_channels, n_steps, TILE.block_m)
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
            n_steps,
            TILE.block_m,
        )
        residual_scale = residual_rstd * load_channel(residual_weight_ptr, offs_c, mask_c, 1.0, acc_type)
        residual_bias = load_channel(residual_bias_ptr, offs_c, mask_c, 0.0, acc_type)
    scale = rstd * load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
    bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type)

    n_own += zero
    first_row = wide(split + zero) * ROWS_PER_SPLIT
    for k in tl.static_range(TILE.n_tiles):
        row = first_row + k * TILE.block_m
        n_left = n_own - k * TILE.block_m
        y = normalize(afresh(x_tiles[k], zero).to(acc_type), mean, scale, bias)
        if residual_mean_ptr is not None:
            residual = afresh(residual_tiles[k], zero).to(acc_type)
            y += normalize(residual, residual_mean, residual_scale, residual_bias)
        elif residual_ptr is not None:
            y += load_tile(residual_ptr, row, n_left, offs_c, mask_c, 1, TILE).to(acc_type)
        if RELU:
            y = relu_and_bits(y, y_ptr, relu_mask_ptr, row, n_left, channel_tile, 0, n_rows, None, TILE)
        store_tile(y_ptr, y, row, n_left, offs_c, mask_c, 1, TILE)


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
    TILE: tl.constexpr,
):
    """Compute dx, the parameters' gradients and the residual's: dz in the add join, else dresidual (B1-B4)."""
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    ROWS_PER_SPLIT: tl.constexpr = TILE.n_tiles * TILE.block_m
    FORK: tl.constexpr = dy_alias_ptr is not None
    BITS: tl.constexpr = relu_mask_ptr is not None
    N_SUMS: tl.constexpr = 2 if residual_ptr is None else 3
    split, channel_tile = part_of_program(TILE)
    offs_c, mask_c = channels_of(channel_tile, TILE.n_channels, TILE.block_c)
    first_row = wide(split) * ROWS_PER_SPLIT
    n_own = tl.minimum(n_rows - first_row, ROWS_PER_SPLIT).to(tl.int32)

    at = (first_row, n_own, offs_c, mask_c, 1)
    dy_tiles = load_tiles(dy_ptr, *at, TILE)
    x_tiles = load_tiles(x_ptr, *at, TILE)
    mean = load_channel(mean_ptr, offs_c, mask_c, 0.0, acc_type)
    rstd = load_channel(rstd_ptr, offs_c, mask_c, 0.0, acc_type)
    scale = rstd * load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
    bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type)
    sum_dz = tl.zeros([TILE.block_m, TILE.block_c], acc_type)
    sum_dz_xhat = tl.zeros([TILE.block_m, TILE.block_c], acc_type)
    sum_dz_rhat = None
    if residual_ptr is not None:
        residual_tiles = load_tiles(residual_ptr, *at, TILE)
        residual_mean = load_channel(residual_mean_ptr, offs_c, mask_c, 0.0, acc_type)
        residual_rstd = load_channel(residual_rstd_ptr, offs_c, mask_c, 0.0, acc_type)
        sum_dz_rhat = tl.zeros([TILE.block_m, TILE.block_c], acc_type)

    dz_tiles = ()
    for k in tl.static_range(TILE.n_tiles):
        row = first_row + k * TILE.block_m
        n_left = n_own - k * TILE.block_m
        dy_alias = load_tile(dy_alias_ptr, row, n_left, offs_c, mask_c, 1, TILE)
        packed = load_bits(relu_mask_ptr, row, n_left, channel_tile, 0, n_rows, None, TILE)
        dz = preactivation_gradient(
            dy_tiles[k], dy_alias, x_tiles[k], packed, mean, scale, bias, FORK, RELU, BITS, TILE
        )
        dz_tiles += (afresh(dz.to(dy_ptr.dtype.element_ty), 0),)
        sum_dz += dz
        sum_dz_xhat += dz * x_hat(x_tiles[k].to(acc_type), mean, rstd)
        if residual_ptr is not None:
            sum_dz_rhat += dz * x_hat(residual_tiles[k].to(acc_type), residual_mean, residual_rstd)
    stride = n_splits * TILE.n_channels
    store_sums(partials_ptr + split * TILE.n_channels + offs_c, stride, mask_c, sum_dz, sum_dz_xhat, sum_dz_rhat)

    zero = wait_for_splits(barrier_ptr + channel_tile, split, n_splits)
    weight = load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
    splits = (stride, offs_c, mask_c, n_splits)
    sums = sum_splits(partials_ptr, *splits, N_SUMS, TILE.n_channels, tl.cdiv(n_splits, TILE.block_m), TILE.block_m)
    first_mask = mask_c & (split == 0)
    store_gradients(sums, dweight_ptr, dbias_ptr, dresidual_weight_ptr, dresidual_bias_ptr, offs_c, first_mask)
    share = 1 / (tl.full([], 0.0, acc_type) + n_rows)

    n_own += zero
    first_row = wide(split + zero) * ROWS_PER_SPLIT
    for k in tl.static_range(TILE.n_tiles):
        at = (first_row + k * TILE.block_m, n_own - k * TILE.block_m, offs_c, mask_c, 1)
        dz = afresh(dz_tiles[k], zero)
        if dz_ptr is not None:
            store_tile(dz_ptr, dz, *at, TILE)
        x = afresh(x_tiles[k], zero).to(acc_type)
        dx = input_gradient(dz.to(acc_type), x, mean, rstd, weight, sums[0] * share, sums[1] * share, True)
        store_tile(dx_ptr, dx, *at, TILE)

    if residual_ptr is not None:
        residual_weight = load_channel(residual_weight_ptr, offs_c, mask_c, 1.0, acc_type)
        for k in tl.static_range(TILE.n_tiles):
            at = (first_row + k * TILE.block_m, n_own - k * TILE.block_m, offs_c, mask_c, 1)
            dz = afresh(dz_tiles[k], zero).to(acc_type)
            values = (afresh(residual_tiles[k], zero).to(acc_type), residual_mean, residual_rstd, residual_weight)
            dresidual = input_gradient(dz, *values, sums[0] * share, sums[2] * share, True)
            store_tile(dresidual_ptr, dresidual, *at, TILE)
