"""Batch norm + residual + ReLU, backward: reduce -> combine -> input gradients. Derivation: README.md beside this file.

dy is the gradient of y and dy_alias that of its second handle (the fork); dz is their sum behind ReLU, the gradient of
the pre-activation. Shapes and arithmetic as in batch_norm_forward.py.
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
    program_index,
    tile_offsets,
    unpack_bits,
)


@triton.jit
def recompute_relu_mask(x, y_type: tl.constexpr, mean, scale, bias):
    """Where ReLU closed, from x: the forward's expression and rounding (B1)."""
    return normalize(x, mean, scale, bias).to(y_type).to(x.dtype) <= 0.0


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
    partial_dz_ptr,
    partial_dz_xhat_ptr,
    partial_dz_rhat_ptr,
    n_rows,
    n_channels,
    n_spatial,
    rows_per_group,
    rows_per_split,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over one split of rows: dz, dz·x̂ with x̂ = (x - mean)·rstd and, for the bn join, the residual's (B2).

    `dz_ptr`, where given, receives dz: with a residual it is the residual's gradient, and behind a fork it saves the
    input-gradient pass one of two reads.
    """
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    n_channels = known_multiple(n_channels, CHANNEL_GROUP)
    n_channel_tiles = tl.cdiv(n_channels, BLOCK_C)
    split = tl.program_id(0) // n_channel_tiles
    group, first_row, end = locate(split, rows_per_split, n_rows, rows_per_group)
    first_channel = (tl.program_id(0) % n_channel_tiles) * BLOCK_C
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    offs_m = tl.arange(0, BLOCK_M)
    group_offs_c = group * n_channels + offs_c
    n_own = tl.minimum(end - first_row, rows_per_split).to(tl.int32)
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

    for start in range(0, n_own, BLOCK_M):
        mask = (start + offs_m < n_own)[:, None] & mask_c[None, :]
        offsets = tile_offsets(first_row + start, offs_c, n_channels, n_spatial, CHANNELS_LAST, BLOCK_M)
        dz = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(acc_type)
        if dy_alias_ptr is not None:
            # Rounded to the data type, as autograd rounds the sum of two gradients.
            dz += tl.load(dy_alias_ptr + offsets, mask=mask, other=0.0).to(acc_type)
            dz = dz.to(dy_ptr.dtype.element_ty).to(acc_type)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc_type)
        if RELU:
            if relu_mask_ptr is None:
                relu_mask = recompute_relu_mask(x, x_ptr.dtype.element_ty, mean, scale, bias)
            else:
                bytes_at, valid = bit_offsets(
                    first_row + start,
                    first_channel,
                    group,
                    n_rows,
                    n_channels,
                    rows_per_group,
                    CHANNELS_LAST,
                    BLOCK_M,
                    BLOCK_C,
                )
                packed = tl.load(relu_mask_ptr + bytes_at, mask=valid, other=0)
                relu_mask = unpack_bits(packed, CHANNELS_LAST, BLOCK_M, BLOCK_C)
            dz = tl.where(relu_mask, 0.0, dz)
        if dz_ptr is not None:
            tl.store(dz_ptr + offsets, dz, mask=mask)
        sum_dz += dz
        sum_dz_xhat += dz * ((x - mean[None, :]) * rstd[None, :])
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_type)
            sum_dz_rhat += dz * ((residual - residual_mean[None, :]) * residual_rstd[None, :])

    partial = split.to(tl.int64) * n_channels + offs_c
    tl.store(partial_dz_ptr + partial, tl.sum(sum_dz, axis=0), mask=mask_c)
    tl.store(partial_dz_xhat_ptr + partial, tl.sum(sum_dz_xhat, axis=0), mask=mask_c)
    if residual_ptr is not None:
        tl.store(partial_dz_rhat_ptr + partial, tl.sum(sum_dz_rhat, axis=0), mask=mask_c)


@triton.jit
def sum_splits(partial_ptr, offs_c, mask_c, n_channels, n_splits, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """[n_splits, n_channels] partial sums of a group -> [BLOCK_C], always in the same order."""
    total = tl.zeros([BLOCK_S, BLOCK_C], partial_ptr.dtype.element_ty)
    for start in range(0, n_splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < n_splits)[:, None] & mask_c[None, :]
        total += tl.load(partial_ptr + offs_s[:, None] * n_channels + offs_c[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def combine_gradients_kernel(
    partial_dz_ptr,
    partial_dz_xhat_ptr,
    partial_dz_rhat_ptr,
    sum_dz_ptr,
    sum_dz_xhat_ptr,
    sum_dz_rhat_ptr,
    dweight_ptr,
    dbias_ptr,
    dresidual_weight_ptr,
    dresidual_bias_ptr,
    n_channels,
    n_groups,
    group_splits,
    n_splits,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sums of every group, for dx; their sum is the parameters' gradient: dbias = Σ dz, dweight = Σ dz·x̂ (B3).

    `group_splits` are those of a whole group; the last may have fewer of the `n_splits`.
    """
    acc_type: tl.constexpr = partial_dz_ptr.dtype.element_ty
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    dbias = tl.zeros([BLOCK_C], acc_type)
    dweight = tl.zeros([BLOCK_C], acc_type)
    dresidual_weight = tl.zeros([BLOCK_C], acc_type)
    for group in range(0, n_groups):
        own_splits = tl.minimum(n_splits - group * group_splits, group_splits)
        group_channels = (tl.full([], 0, tl.int64) + group) * n_channels
        first_partial = group_channels * group_splits
        sum_dz = sum_splits(partial_dz_ptr + first_partial, offs_c, mask_c, n_channels, own_splits, BLOCK_S, BLOCK_C)
        sum_dz_xhat = sum_splits(
            partial_dz_xhat_ptr + first_partial, offs_c, mask_c, n_channels, own_splits, BLOCK_S, BLOCK_C
        )
        tl.store(sum_dz_ptr + group_channels + offs_c, sum_dz, mask=mask_c)
        tl.store(sum_dz_xhat_ptr + group_channels + offs_c, sum_dz_xhat, mask=mask_c)
        dbias += sum_dz
        dweight += sum_dz_xhat
        if partial_dz_rhat_ptr is not None:
            sum_dz_rhat = sum_splits(
                partial_dz_rhat_ptr + first_partial, offs_c, mask_c, n_channels, own_splits, BLOCK_S, BLOCK_C
            )
            tl.store(sum_dz_rhat_ptr + group_channels + offs_c, sum_dz_rhat, mask=mask_c)
            dresidual_weight += sum_dz_rhat

    if dweight_ptr is not None:
        tl.store(dweight_ptr + offs_c, dweight, mask=mask_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs_c, dbias, mask=mask_c)
    if dresidual_weight_ptr is not None:
        tl.store(dresidual_weight_ptr + offs_c, dresidual_weight, mask=mask_c)
    if dresidual_bias_ptr is not None:
        tl.store(dresidual_bias_ptr + offs_c, dbias, mask=mask_c)


@triton.jit
def input_gradient(dz, x, mean, rstd, weight, sum_dz, sum_dz_xhat, n_rows, TRAINING: tl.constexpr):
    """dx of one batch norm from dz (B4 with batch statistics, B5 with frozen ones)."""
    scale = (rstd * weight)[None, :]
    if TRAINING:
        mean_dz = sum_dz / n_rows
        mean_dz_xhat = sum_dz_xhat / n_rows
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
    sum_dz_ptr,
    sum_dz_xhat_ptr,
    sum_dz_rhat_ptr,
    dx_ptr,
    dresidual_ptr,
    n_rows,
    n_channels,
    n_spatial,
    rows_per_group,
    RELU: tl.constexpr,
    TRAINING: tl.constexpr,
    RESIDUAL_TRAINING: tl.constexpr,
    REVERSED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNEL_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx and, for the bn join, dresidual. RELU: `dz_ptr` is dy, and ReLU's sign is recomputed from x."""
    acc_type: tl.constexpr = mean_ptr.dtype.element_ty
    LAST_USE: tl.constexpr = "evict_first" if REVERSED else ""
    n_channels = known_multiple(n_channels, CHANNEL_GROUP)
    n_channel_tiles = tl.cdiv(n_channels, BLOCK_C)
    index = program_index(REVERSED)
    group, first_row, end = locate(index // n_channel_tiles, BLOCK_M, n_rows, rows_per_group)
    offs_c = (index % n_channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    group_offs_c = group * n_channels + offs_c
    mask_c = offs_c < n_channels
    mask = (first_row + tl.arange(0, BLOCK_M) < end)[:, None] & mask_c[None, :]
    offsets = tile_offsets(first_row, offs_c, n_channels, n_spatial, CHANNELS_LAST, BLOCK_M)

    dz = tl.load(dz_ptr + offsets, mask=mask, other=0.0, eviction_policy=LAST_USE).to(acc_type)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0, eviction_policy=LAST_USE).to(acc_type)
    mean = load_channel(mean_ptr, group_offs_c, mask_c, 0.0, acc_type)
    rstd = load_channel(rstd_ptr, group_offs_c, mask_c, 0.0, acc_type)
    weight = load_channel(weight_ptr, offs_c, mask_c, 1.0, acc_type)
    sum_dz = load_channel(sum_dz_ptr, group_offs_c, mask_c, 0.0, acc_type)
    sum_dz_xhat = load_channel(sum_dz_xhat_ptr, group_offs_c, mask_c, 0.0, acc_type)
    if RELU:
        bias = load_channel(bias_ptr, offs_c, mask_c, 0.0, acc_type)
        dz = tl.where(recompute_relu_mask(x, x_ptr.dtype.element_ty, mean, rstd * weight, bias), 0.0, dz)
    if rows_per_group is not None:
        start, _ = group_of_rows(group, n_rows, rows_per_group)
        n_rows = end - start
    dx = input_gradient(dz, x, mean, rstd, weight, sum_dz, sum_dz_xhat, n_rows, TRAINING)
    tl.store(dx_ptr + offsets, dx, mask=mask)

    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0, eviction_policy=LAST_USE).to(acc_type)
        mean = load_channel(residual_mean_ptr, group_offs_c, mask_c, 0.0, acc_type)
        rstd = load_channel(residual_rstd_ptr, group_offs_c, mask_c, 0.0, acc_type)
        weight = load_channel(residual_weight_ptr, offs_c, mask_c, 1.0, acc_type)
        sum_dz_rhat = load_channel(sum_dz_rhat_ptr, group_offs_c, mask_c, 0.0, acc_type)
        dresidual = input_gradient(dz, residual, mean, rstd, weight, sum_dz, sum_dz_rhat, n_rows, RESIDUAL_TRAINING)
        tl.store(dresidual_ptr + offsets, dresidual, mask=mask)
