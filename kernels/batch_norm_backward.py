"""Batch norm + residual + ReLU, backward: reduce -> combine -> input gradients. Derivation: README.md in this folder.

dy is the gradient of y, and dy_alias the gradient of y's second handle (the fork). dz, the gradient of the
pre-activation, is their sum where ReLU's output is not 0, else 0. A batch norm needs N_SUMS sums: of dz, of dz·x̂ and,
in the bn join, of dz times the residual's x̂. Partial sums are [N_SUMS, n_splits, n_channels], the sums of a pass
[N_SUMS, n_groups, n_channels]. Other shapes and the arithmetic are as in batch_norm_forward.py.
"""

import triton
import triton.language as tl

from .tile_access import (
    channels_of,
    group_of_rows,
    load_bits,
    load_channel,
    load_tile,
    load_tiles,
    locate,
    normalize,
    part_of_program,
    store_tile,
    unpack_bits,
    wait_for_previous_kernel,
    wide,
)


@triton.jit
def recompute_relu_mask(x, y_type: tl.constexpr, mean, scale, bias):
    """Return where ReLU's output is 0, from x, by the forward's expression and rounding (B1)."""
    return normalize(x, mean, scale, bias).to(y_type).to(x.dtype) <= 0.0


@triton.jit
def x_hat(x, mean, rstd):
    """Return x̂ = (x - mean)·rstd."""
    return (x - mean[None, :]) * rstd[None, :]


@triton.jit
def preactivation_gradient(
    dy,
    dy_alias,
    x,
    packed,
    mean,
    scale,
    bias,
    FORK: tl.constexpr,
    RELU: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return dz in the accumulation type, from dy and, with FORK, dy_alias.

    With BITS, ReLU's mask is unpacked from `packed`; without, it is recomputed from x.
    """
    dz = dy.to(mean.dtype)
    if FORK:
        # Round to the data type, as autograd rounds the sum of two gradients.
        dz = (dz + dy_alias.to(mean.dtype)).to(dy.dtype).to(mean.dtype)
    if RELU:
        if BITS:
            relu_mask = unpack_bits(packed, TILE)
        else:
            relu_mask = recompute_relu_mask(x.to(mean.dtype), x.dtype, mean, scale, bias)
        dz = tl.where(relu_mask, 0.0, dz)
    return dz


@triton.jit
def store_sums(partial_ptrs, stride, mask_c, sum_dz, sum_dz_xhat, sum_dz_rhat):
    """Reduce a split's sums, [P, BLOCK_C] each, to [BLOCK_C] and store them; `sum_dz_rhat` may be None."""
    tl.store(partial_ptrs, tl.sum(sum_dz, axis=0), mask=mask_c)
    tl.store(partial_ptrs + stride, tl.sum(sum_dz_xhat, axis=0), mask=mask_c)
    if sum_dz_rhat is not None:
        tl.store(partial_ptrs + 2 * stride, tl.sum(sum_dz_rhat, axis=0), mask=mask_c)


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
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sum dz, dz·x̂ and, in the bn join, dz times the residual's x̂ over one split of rows (B2).

    `dz_ptr`, if given, receives dz. In the add join dz is the residual's gradient. After a fork or with ReLU's bits, it
    also saves the input-gradient pass a second input.
    """
    wait_for_previous_kernel(PDL)
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    FORK: tl.constexpr = dy_alias_ptr is not None
    BITS: tl.constexpr = relu_mask_ptr is not None
    split, channel_tile = part_of_program(TILE)
    offs_c, mask_c = channels_of(channel_tile, TILE.n_channels, TILE.block_c)
    group, first_row, n_own = locate(split, rows_per_split, n_rows, rows_per_group)
    group_offs_c = group * TILE.n_channels + offs_c
    mean = load_channel(mean_ptr, group_offs_c, mask_c, 0.0, acc_type)
    rstd = load_channel(rstd_ptr, group_offs_c, mask_c, 0.0, acc_type)
    scale = rstd * load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
    bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type)
    sum_dz = tl.zeros([TILE.block_m, TILE.block_c], acc_type)
    sum_dz_xhat = tl.zeros([TILE.block_m, TILE.block_c], acc_type)
    sum_dz_rhat = None
    if residual_ptr is not None:
        residual_mean = load_channel(residual_mean_ptr, group_offs_c, mask_c, 0.0, acc_type)
        residual_rstd = load_channel(residual_rstd_ptr, group_offs_c, mask_c, 0.0, acc_type)
        sum_dz_rhat = tl.zeros([TILE.block_m, TILE.block_c], acc_type)

    for offset in range(0, n_own, TILE.n_tiles * TILE.block_m):
        tiles = ()
        for k in tl.static_range(TILE.n_tiles):
            row = first_row + offset + k * TILE.block_m
            n_left = n_own - offset - k * TILE.block_m
            at = (row, n_left, offs_c, mask_c, n_spatial)
            dy = load_tile(dy_ptr, *at, TILE)
            dy_alias = load_tile(dy_alias_ptr, *at, TILE)
            x = load_tile(x_ptr, *at, TILE)
            residual = load_tile(residual_ptr, *at, TILE)
            packed = load_bits(relu_mask_ptr, row, n_left, channel_tile, group, n_rows, rows_per_group, TILE)
            tiles += ((row, n_left, dy, dy_alias, x, packed, residual),)
        for k in tl.static_range(TILE.n_tiles):
            row, n_left, dy, dy_alias, x, packed, residual = tiles[k]
            dz = preactivation_gradient(dy, dy_alias, x, packed, mean, scale, bias, FORK, RELU, BITS, TILE)
            if dz_ptr is not None:
                store_tile(dz_ptr, dz, row, n_left, offs_c, mask_c, n_spatial, TILE)
            sum_dz += dz
            sum_dz_xhat += dz * x_hat(x.to(acc_type), mean, rstd)
            if residual_ptr is not None:
                sum_dz_rhat += dz * x_hat(residual.to(acc_type), residual_mean, residual_rstd)

    partial_ptrs = partials_ptr + wide(split) * TILE.n_channels + offs_c
    store_sums(partial_ptrs, wide(n_splits) * TILE.n_channels, mask_c, sum_dz, sum_dz_xhat, sum_dz_rhat)


@triton.jit
def sum_splits(
    partials_ptr,
    stride,
    offs_c,
    mask_c,
    n_splits,
    N_SUMS: tl.constexpr,
    N_CHANNELS: tl.constexpr,
    n_steps,
    BLOCK_S: tl.constexpr,
):
    """Add up a group's partial sums in a fixed order: N_SUMS times [BLOCK_C]. `n_steps` is as in `merge_splits`."""
    totals = ()
    for _ in tl.static_range(N_SUMS):
        totals += (tl.zeros([BLOCK_S, offs_c.shape[0]], partials_ptr.dtype.element_ty),)
    for step in range(0, n_steps):
        offs_s = step * BLOCK_S + tl.arange(0, BLOCK_S)
        mask = (offs_s < n_splits)[:, None] & mask_c[None, :]
        pointers = partials_ptr + (offs_s[:, None] * N_CHANNELS + offs_c[None, :])
        more = ()
        for k in tl.static_range(N_SUMS):
            more += (totals[k] + tl.load(pointers + k * stride, mask=mask, other=0.0),)
        totals = more
    sums = ()
    for k in tl.static_range(N_SUMS):
        sums += (tl.sum(totals[k], axis=0),)
    return sums


@triton.jit
def store_gradients(sums, dweight_ptr, dbias_ptr, dresidual_weight_ptr, dresidual_bias_ptr, offs_c, mask_c):
    """Store the parameters' gradients, given the sums over all rows: dbias = Σ dz, dweight = Σ dz·x̂ (B3)."""
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
    """Store each group's sums, for dx, and the parameters' gradients: the groups' sums, added up in order (B3).

    A full group has `group_splits` of the `n_splits` splits; the last group may have fewer.
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
        splits = (wide(n_splits) * N_CHANNELS, offs_c, mask_c, own_splits)
        sums = sum_splits(partials_ptr + first_split * N_CHANNELS, *splits, N_SUMS, N_CHANNELS, N_STEPS, BLOCK_S)
        more = ()
        for k in tl.static_range(N_SUMS):
            tl.store(sums_ptr + (wide(k) * n_groups + group) * N_CHANNELS + offs_c, sums[k], mask=mask_c)
            more += (totals[k] + sums[k],)
        totals = more
    store_gradients(totals, dweight_ptr, dbias_ptr, dresidual_weight_ptr, dresidual_bias_ptr, offs_c, mask_c)


@triton.jit
def input_gradient(dz, x, mean, rstd, weight, mean_dz, mean_dz_xhat, TRAINING: tl.constexpr):
    """Return dx of one batch norm, from dz (B4 with batch statistics, B5 with frozen ones)."""
    scale = (rstd * weight)[None, :]
    if TRAINING:
        dx = scale * (dz - mean_dz[None, :] - x_hat(x, mean, rstd) * mean_dz_xhat[None, :])
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
    TILE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute dx and, in the bn join, dresidual. With RELU `dz_ptr` is dy, and ReLU's mask is recomputed from x.

    With `partials_ptr`, each program adds up its channels' partial sums, and the programs of the first rows store the
    parameters' gradients. Without, the sums are read from `sums_ptr`.
    """
    wait_for_previous_kernel(PDL)
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    N_SUMS: tl.constexpr = 2 if residual_ptr is None else 3
    part, channel_tile = part_of_program(TILE, REVERSED)
    offs_c, mask_c = channels_of(channel_tile, TILE.n_channels, TILE.block_c)
    group, first_row, n_own = locate(part, TILE.n_tiles * TILE.block_m, n_rows, rows_per_group)
    group_offs_c = group * TILE.n_channels + offs_c

    dz_tiles = load_tiles(dz_ptr, first_row, n_own, offs_c, mask_c, n_spatial, TILE, REVERSED)
    x_tiles = load_tiles(x_ptr, first_row, n_own, offs_c, mask_c, n_spatial, TILE, REVERSED)
    residual_tiles = load_tiles(residual_ptr, first_row, n_own, offs_c, mask_c, n_spatial, TILE, REVERSED)

    mean = load_channel(mean_ptr, group_offs_c, mask_c, 0.0, acc_type)
    rstd = load_channel(rstd_ptr, group_offs_c, mask_c, 0.0, acc_type)
    weight = load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
    bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type)
    if residual_ptr is not None:
        residual_mean = load_channel(residual_mean_ptr, group_offs_c, mask_c, 0.0, acc_type)
        residual_rstd = load_channel(residual_rstd_ptr, group_offs_c, mask_c, 0.0, acc_type)
        residual_weight = load_channel(residual_weight_ptr, offs_c, mask_c, 1.0, acc_type)
    if partials_ptr is not None:
        splits = (wide(n_splits) * TILE.n_channels, offs_c, mask_c, n_splits)
        sums = sum_splits(partials_ptr, *splits, N_SUMS, TILE.n_channels, 1, BLOCK_S)
        first_mask = mask_c & (first_row == 0)
        store_gradients(sums, dweight_ptr, dbias_ptr, dresidual_weight_ptr, dresidual_bias_ptr, offs_c, first_mask)
    else:
        sums = ()
        for k in tl.static_range(N_SUMS):
            sum_ptr = sums_ptr + wide(k) * n_groups * TILE.n_channels
            sums += (load_channel(sum_ptr, group_offs_c, mask_c, 0.0, acc_type),)
    start, end = group_of_rows(group, n_rows, rows_per_group)
    share = 1 / (tl.full([], 0.0, acc_type) + (end - start))
    means = ()
    for k in tl.static_range(N_SUMS):
        means += (sums[k] * share,)

    for k in tl.static_range(TILE.n_tiles):
        at = (first_row + k * TILE.block_m, n_own - k * TILE.block_m, offs_c, mask_c, n_spatial)
        dz = dz_tiles[k].to(acc_type)
        x = x_tiles[k].to(acc_type)
        if RELU:
            relu_mask = recompute_relu_mask(x, x_ptr.dtype.element_ty, mean, rstd * weight, bias)
            dz = tl.where(relu_mask, 0.0, dz)
        store_tile(dx_ptr, input_gradient(dz, x, mean, rstd, weight, means[0], means[1], TRAINING), *at, TILE)
        if residual_ptr is not None:
            values = (residual_tiles[k].to(acc_type), residual_mean, residual_rstd, residual_weight, means[0], means[2])
            store_tile(dresidual_ptr, input_gradient(dz, *values, RESIDUAL_TRAINING), *at, TILE)
