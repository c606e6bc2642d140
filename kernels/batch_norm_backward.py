"""Batch norm + residual + ReLU, backward: reduce -> combine -> input gradients. Derivation: README.md beside this file.

dy is the gradient of y and dy_alias that of its second handle (the fork); dz is their sum behind ReLU, the gradient of
the pre-activation. The sums of a batch norm are those of dz, of dz·x̂ and, in the bn join, of dz times the residual's
x̂: N_SUMS of them. Partial ones are [N_SUMS, n_splits, N_CHANNELS], those of a pass [N_SUMS, n_groups, N_CHANNELS].
Other shapes and arithmetic as in batch_norm_forward.py.
"""

import triton
import triton.language as tl

from .tile_access import (
    bit_offsets,
    channels_of,
    group_of_rows,
    load_channel,
    load_tile,
    locate,
    normalize,
    program_index,
    tile_mask,
    tile_pointers,
    unpack_bits,
    wait_for_previous_kernel,
    wide,
)


@triton.jit
def recompute_relu_mask(x, y_type: tl.constexpr, mean, scale, bias):
    """Where ReLU closed, from x: the forward's expression and rounding (B1)."""
    return normalize(x, mean, scale, bias).to(y_type).to(x.dtype) <= 0.0


@triton.jit
def load_bits(
    relu_mask_ptr,
    first_row,
    n_own,
    first_channel,
    group,
    n_rows,
    rows_per_group,
    N_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The packed ReLU bits of a tile; 0 without a mask."""
    if relu_mask_ptr is None:
        packed = 0
    else:
        bytes_at, valid = bit_offsets(
            first_row,
            n_own,
            first_channel,
            group,
            n_rows,
            rows_per_group,
            N_CHANNELS,
            CHANNELS_LAST,
            BLOCK_M,
            BLOCK_C,
        )
        packed = tl.load(relu_mask_ptr + bytes_at, mask=valid, other=0)
    return packed


@triton.jit
def reduce_kernel(
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
    dz_ptr,
    partials_ptr,
    n_rows,
    n_spatial,
    rows_per_group,
    rows_per_split,
    n_splits,
    RELU: tl.constexpr,
    N_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    N_TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sums over one split of rows: dz, dz·x̂ with x̂ = (x - mean)·rstd and, for the bn join, the residual's (B2).

    `dz_ptr`, where given, receives dz: with a residual it is the residual's gradient, and behind a fork it saves the
    input-gradient pass one of two reads. Each thread has N_TILES loads of every tensor on their way.
    """
    wait_for_previous_kernel(PDL)
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    STEP: tl.constexpr = N_TILES * BLOCK_M
    N_CHANNEL_TILES: tl.constexpr = (N_CHANNELS + BLOCK_C - 1) // BLOCK_C
    split = tl.program_id(0) // N_CHANNEL_TILES
    first_channel = (tl.program_id(0) % N_CHANNEL_TILES) * BLOCK_C
    offs_c, mask_c = channels_of(tl.program_id(0) % N_CHANNEL_TILES, N_CHANNELS, BLOCK_C)
    group, first_row, n_own = locate(split, rows_per_split, n_rows, rows_per_group)
    group_offs_c = group * N_CHANNELS + offs_c
    mean = load_channel(mean_ptr, group_offs_c, mask_c, 0.0, acc_type)
    rstd = load_channel(rstd_ptr, group_offs_c, mask_c, 0.0, acc_type)
    if RELU and relu_mask_ptr is None:
        scale = rstd * load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
        bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type)
    if residual_ptr is not None:
        residual_mean = load_channel(residual_mean_ptr, group_offs_c, mask_c, 0.0, acc_type)
        residual_rstd = load_channel(residual_rstd_ptr, group_offs_c, mask_c, 0.0, acc_type)
        sum_dz_rhat = tl.zeros([BLOCK_M, BLOCK_C], acc_type)
    sum_dz = tl.zeros([BLOCK_M, BLOCK_C], acc_type)
    sum_dz_xhat = tl.zeros([BLOCK_M, BLOCK_C], acc_type)

    for start in range(0, n_own, STEP):
        tiles = ()
        for k in tl.static_range(N_TILES):
            row = start + k * BLOCK_M
            at = (first_row + row, n_own - row, offs_c, mask_c, n_spatial)
            tiles += (
                (
                    load_tile(dy_ptr, *at, N_CHANNELS, CHANNELS_LAST, BLOCK_M),
                    load_tile(dy_alias_ptr, *at, N_CHANNELS, CHANNELS_LAST, BLOCK_M),
                    load_tile(x_ptr, *at, N_CHANNELS, CHANNELS_LAST, BLOCK_M),
                    load_tile(residual_ptr, *at, N_CHANNELS, CHANNELS_LAST, BLOCK_M),
                    load_bits(
                        relu_mask_ptr,
                        first_row + row,
                        n_own - row,
                        first_channel,
                        group,
                        n_rows,
                        rows_per_group,
                        N_CHANNELS,
                        CHANNELS_LAST,
                        BLOCK_M,
                        BLOCK_C,
                    ),
                ),
            )
        for k in tl.static_range(N_TILES):
            dy, dy_alias, x, residual, packed = tiles[k]
            dz = dy.to(acc_type)
            if dy_alias_ptr is not None:
                # Rounded to the data type, as autograd rounds the sum of two gradients.
                dz = (dz + dy_alias.to(acc_type)).to(dy_ptr.dtype.element_ty).to(acc_type)
            x = x.to(acc_type)
            if RELU:
                if relu_mask_ptr is None:
                    relu_mask = recompute_relu_mask(x, x_ptr.dtype.element_ty, mean, scale, bias)
                else:
                    relu_mask = unpack_bits(packed, CHANNELS_LAST, BLOCK_M, BLOCK_C)
                dz = tl.where(relu_mask, 0.0, dz)
            if dz_ptr is not None:
                row = start + k * BLOCK_M
                pointers = tile_pointers(dz_ptr, first_row + row, offs_c, n_spatial, N_CHANNELS, CHANNELS_LAST, BLOCK_M)
                tl.store(pointers, dz, mask=tile_mask(n_own - row, mask_c, BLOCK_M))
            sum_dz += dz
            sum_dz_xhat += dz * ((x - mean[None, :]) * rstd[None, :])
            if residual_ptr is not None:
                sum_dz_rhat += dz * ((residual.to(acc_type) - residual_mean[None, :]) * residual_rstd[None, :])

    sum_stride = wide(n_splits) * N_CHANNELS
    partial_ptrs = partials_ptr + wide(split) * N_CHANNELS + offs_c
    tl.store(partial_ptrs, tl.sum(sum_dz, axis=0), mask=mask_c)
    tl.store(partial_ptrs + sum_stride, tl.sum(sum_dz_xhat, axis=0), mask=mask_c)
    if residual_ptr is not None:
        tl.store(partial_ptrs + 2 * sum_stride, tl.sum(sum_dz_rhat, axis=0), mask=mask_c)


@triton.jit
def sum_splits(
    partials_ptr,
    sum_stride,
    offs_c,
    mask_c,
    n_splits,
    N_SUMS: tl.constexpr,
    N_CHANNELS: tl.constexpr,
    N_STEPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial sums of a group -> N_SUMS times [BLOCK_C], always in the same order."""
    acc_type: tl.constexpr = partials_ptr.dtype.element_ty
    totals = ()
    for _ in tl.static_range(N_SUMS):
        totals += (tl.zeros([BLOCK_S, BLOCK_C], acc_type),)
    for step in tl.static_range(N_STEPS):
        offs_s = step * BLOCK_S + tl.arange(0, BLOCK_S)
        mask = (offs_s < n_splits)[:, None] & mask_c[None, :]
        pointers = partials_ptr + (offs_s[:, None] * N_CHANNELS + offs_c[None, :])
        more = ()
        for k in tl.static_range(N_SUMS):
            more += (totals[k] + tl.load(pointers + k * sum_stride, mask=mask, other=0.0),)
        totals = more
    sums = ()
    for k in tl.static_range(N_SUMS):
        sums += (tl.sum(totals[k], axis=0),)
    return sums


@triton.jit
def store_gradients(
    sums,
    dweight_ptr,
    dbias_ptr,
    dresidual_weight_ptr,
    dresidual_bias_ptr,
    offs_c,
    mask_c,
):
    """The parameters' gradients from the sums of all rows: dbias = Σ dz, dweight = Σ dz·x̂ (B3)."""
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs_c, sums[0], mask=mask_c)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + offs_c, sums[1], mask=mask_c)
    if dresidual_bias_ptr is not None:
        tl.store(dresidual_bias_ptr + offs_c, sums[0], mask=mask_c)
    if dresidual_weight_ptr is not None:
        tl.store(dresidual_weight_ptr + offs_c, sums[2], mask=mask_c)


@triton.jit
def combine_gradients_kernel(
    partials_ptr,
    sums_ptr,
    dweight_ptr,
    dbias_ptr,
    dresidual_weight_ptr,
    dresidual_bias_ptr,
    n_splits,
    n_groups,
    group_splits,
    N_SUMS: tl.constexpr,
    N_CHANNELS: tl.constexpr,
    N_STEPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """The sums of every group, for dx, and the parameters' gradients, the groups' sums added up in order (B3).

    `group_splits` are those of a whole group; the last may have fewer of the `n_splits`.
    """
    wait_for_previous_kernel(PDL)
    acc_type: tl.constexpr = partials_ptr.dtype.element_ty
    offs_c, mask_c = channels_of(tl.program_id(0), N_CHANNELS, BLOCK_C)
    totals = ()
    for _ in tl.static_range(N_SUMS):
        totals += (tl.zeros([BLOCK_C], acc_type),)
    for group in range(0, n_groups):
        first_split = wide(group) * group_splits
        own_splits = tl.minimum(n_splits - first_split, group_splits).to(tl.int32)
        sums = sum_splits(
            partials_ptr + first_split * N_CHANNELS,
            wide(n_splits) * N_CHANNELS,
            offs_c,
            mask_c,
            own_splits,
            N_SUMS,
            N_CHANNELS,
            N_STEPS,
            BLOCK_S,
            BLOCK_C,
        )
        more = ()
        for k in tl.static_range(N_SUMS):
            tl.store(sums_ptr + (wide(k) * n_groups + group) * N_CHANNELS + offs_c, sums[k], mask=mask_c)
            more += (totals[k] + sums[k],)
        totals = more
    store_gradients(totals, dweight_ptr, dbias_ptr, dresidual_weight_ptr, dresidual_bias_ptr, offs_c, mask_c)


@triton.jit
def input_gradient(dz, x, mean, rstd, weight, mean_dz, mean_dz_xhat, TRAINING: tl.constexpr):
    """dx of one batch norm from dz (B4 with batch statistics, B5 with frozen ones)."""
    scale = (rstd * weight)[None, :]
    if TRAINING:
        xhat = (x - mean[None, :]) * rstd[None, :]
        dx = scale * (dz - mean_dz[None, :] - xhat * mean_dz_xhat[None, :])
    else:
        dx = scale * dz
    return dx


@triton.jit
def input_gradients_kernel(
    dz_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    residual_mean_ptr,
    residual_rstd_ptr,
    residual_weight_ptr,
    partials_ptr,
    sums_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    dresidual_weight_ptr,
    dresidual_bias_ptr,
    n_rows,
    n_spatial,
    rows_per_group,
    n_splits,
    n_groups,
    RELU: tl.constexpr,
    TRAINING: tl.constexpr,
    RESIDUAL_TRAINING: tl.constexpr,
    REVERSED: tl.constexpr,
    N_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    N_TILES: tl.constexpr,
    N_STEPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """dx and, for the bn join, dresidual. RELU: `dz_ptr` is dy, and ReLU's sign is recomputed from x.

    With `partials_ptr` every program sums up the partial results of its channels, and the first ones store the
    parameters' gradients; without, the sums are read.
    """
    wait_for_previous_kernel(PDL)
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    LAST_USE: tl.constexpr = "evict_first" if REVERSED else ""
    N_SUMS: tl.constexpr = 2 if residual_ptr is None else 3
    N_CHANNEL_TILES: tl.constexpr = (N_CHANNELS + BLOCK_C - 1) // BLOCK_C
    index = program_index(REVERSED)
    offs_c, mask_c = channels_of(index % N_CHANNEL_TILES, N_CHANNELS, BLOCK_C)
    group, first_row, n_own = locate(index // N_CHANNEL_TILES, N_TILES * BLOCK_M, n_rows, rows_per_group)
    group_offs_c = group * N_CHANNELS + offs_c

    dz_tiles, x_tiles, residual_tiles = (), (), ()
    for k in tl.static_range(N_TILES):
        at = (first_row + k * BLOCK_M, n_own - k * BLOCK_M, offs_c, mask_c, n_spatial)
        dz_tiles += (load_tile(dz_ptr, *at, N_CHANNELS, CHANNELS_LAST, BLOCK_M, LAST_USE),)
        x_tiles += (load_tile(x_ptr, *at, N_CHANNELS, CHANNELS_LAST, BLOCK_M, LAST_USE),)
        residual_tiles += (load_tile(residual_ptr, *at, N_CHANNELS, CHANNELS_LAST, BLOCK_M, LAST_USE),)

    mean = load_channel(mean_ptr, group_offs_c, mask_c, 0.0, acc_type)
    rstd = load_channel(rstd_ptr, group_offs_c, mask_c, 0.0, acc_type)
    weight = load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
    if RELU:
        bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type)
    if residual_ptr is not None:
        residual_mean = load_channel(residual_mean_ptr, group_offs_c, mask_c, 0.0, acc_type)
        residual_rstd = load_channel(residual_rstd_ptr, group_offs_c, mask_c, 0.0, acc_type)
        residual_weight = load_channel(residual_weight_ptr, offs_c, mask_c, 1.0, acc_type)
    if partials_ptr is not None:
        sum_stride = wide(n_splits) * N_CHANNELS
        sums = sum_splits(
            partials_ptr, sum_stride, offs_c, mask_c, n_splits, N_SUMS, N_CHANNELS, N_STEPS, BLOCK_S, BLOCK_C
        )
        first_mask = mask_c & (first_row == 0)
        store_gradients(sums, dweight_ptr, dbias_ptr, dresidual_weight_ptr, dresidual_bias_ptr, offs_c, first_mask)
    else:
        sums = ()
        for k in tl.static_range(N_SUMS):
            sums += (load_channel(sums_ptr + wide(k) * n_groups * N_CHANNELS, group_offs_c, mask_c, 0.0, acc_type),)
    start, end = group_of_rows(group, n_rows, rows_per_group)
    share = 1 / (tl.full([], 0.0, acc_type) + (end - start))
    means = ()
    for k in tl.static_range(N_SUMS):
        means += (sums[k] * share,)

    for k in tl.static_range(N_TILES):
        row = first_row + k * BLOCK_M
        mask = tile_mask(n_own - k * BLOCK_M, mask_c, BLOCK_M)
        dz = dz_tiles[k].to(acc_type)
        x = x_tiles[k].to(acc_type)
        if RELU:
            relu_mask = recompute_relu_mask(x, x_ptr.dtype.element_ty, mean, rstd * weight, bias)
            dz = tl.where(relu_mask, 0.0, dz)
        dx = input_gradient(dz, x, mean, rstd, weight, means[0], means[1], TRAINING)
        tl.store(tile_pointers(dx_ptr, row, offs_c, n_spatial, N_CHANNELS, CHANNELS_LAST, BLOCK_M), dx, mask=mask)
        if residual_ptr is not None:
            residual = residual_tiles[k].to(acc_type)
            dresidual = input_gradient(
                dz, residual, residual_mean, residual_rstd, residual_weight, means[0], means[2], RESIDUAL_TRAINING
            )
            pointers = tile_pointers(dresidual_ptr, row, offs_c, n_spatial, N_CHANNELS, CHANNELS_LAST, BLOCK_M)
            tl.store(pointers, dresidual, mask=mask)
