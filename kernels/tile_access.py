"""What the forward and the backward kernels share: where a tile lies in memory, its channel vectors, the ReLU bits.

With ghost batches, rows fall into groups of `rows_per_group`, the last of which may be smaller; None stands for one
group of all rows, and compiles to code that knows nothing of groups. Parts of the rows, tiles or splits, are counted
group after group, and none crosses the end of its group.
"""

import triton
import triton.language as tl


@triton.jit
def program_index(REVERSED: tl.constexpr):
    """The program's number, or counted from the last: a second pass meets first what the first left in the L2 cache."""
    index = tl.program_id(0)
    if REVERSED:
        index = tl.num_programs(0) - 1 - index
    return index


@triton.jit
def group_of_rows(group, n_rows, rows_per_group):
    """First row of a group of rows, and the row behind its last."""
    if rows_per_group is None:
        start = 0
        end = n_rows
    else:
        start = (tl.full([], 0, tl.int64) + group) * rows_per_group
        end = tl.minimum(start + rows_per_group, n_rows)
    return start, end


@triton.jit
def locate(part, rows_per_part, n_rows, rows_per_group):
    """A part of the rows: its group, first row (int64), and the row behind the last of its group."""
    if rows_per_group is None:
        group = 0
        first_row = part.to(tl.int64) * rows_per_part
        end = n_rows
    else:
        parts_per_group = tl.cdiv(rows_per_group, rows_per_part)
        group = (part // parts_per_group).to(tl.int64)
        start, end = group_of_rows(group, n_rows, rows_per_group)
        first_row = start + (part % parts_per_group).to(tl.int64) * rows_per_part
    return group, first_row, end


@triton.jit
def tile_offsets(first_row, offs_c, n_channels, n_spatial, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr):
    """Element offsets [BLOCK_M, BLOCK_C], int64, of the rows from `first_row` (int64) and the channels `offs_c`.

    Row m is pixel m mod H·W of image m div H·W, in both layouts.
    """
    offs_m = tl.arange(0, BLOCK_M)
    if CHANNELS_LAST:
        offsets = (first_row + offs_m)[:, None] * n_channels + offs_c[None, :]
    else:
        # One 64-bit division per tile; the rows inside it are counted from their first image in 32 bits.
        first_image = first_row // n_spatial
        pixels = (first_row % n_spatial).to(tl.int32) + offs_m
        rows = (first_image + pixels // n_spatial) * n_channels * n_spatial + pixels % n_spatial
        offsets = rows[:, None] + offs_c.to(tl.int64)[None, :] * n_spatial
    return offsets


@triton.jit
def known_multiple(n, factor: tl.constexpr):
    """n, shown to the compiler as a multiple of `factor`: of itself it knows 16 alone, and 24 would load narrow."""
    return n // factor * factor


@triton.jit
def load_channel(ptr, offs_c, mask_c, default: tl.constexpr, acc_type: tl.constexpr):
    """A per-channel vector in the accumulation type; `default` where the layer has no such vector."""
    if ptr is None:
        value = tl.full(offs_c.shape, default, acc_type)
    else:
        value = tl.load(ptr + offs_c, mask=mask_c, other=default).to(acc_type)
    return value


@triton.jit
def normalize(x, mean, scale, bias):
    """(x - mean)·scale + bias (N1). Written once, with an explicit fma: the backward recomputes ReLU's sign from it."""
    return tl.fma(x - mean[None, :], tl.broadcast_to(scale[None, :], x.shape), tl.broadcast_to(bias[None, :], x.shape))


@triton.jit
def bit_offsets(
    first_row,
    first_channel,
    group,
    n_rows,
    n_channels,
    rows_per_group,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Byte offsets (int64) and validity of a tile's ReLU bits; tiles start at multiples of eight rows and channels.

    channels_last: [n_rows, ceil(n_channels / 8)] bytes, bit i of a byte is its channel 8·byte + i.
    NCHW:          [n_channels, ceil(n_rows / 8)] bytes, bit i of a byte is its row 8·byte + i. Of groups, whose rows
                   may be no multiple of eight, each has such bytes of its own rows, one group after the other.
    """
    start, end = group_of_rows(group, n_rows, rows_per_group)
    if CHANNELS_LAST:
        rows = first_row + tl.arange(0, BLOCK_M)
        n_bytes = tl.cdiv(n_channels, 8)
        byte = first_channel // 8 + tl.arange(0, BLOCK_C // 8)
        offsets = rows[:, None] * n_bytes + byte[None, :]
        valid = (rows < end)[:, None] & (byte < n_bytes)[None, :]
    else:
        channels = first_channel.to(tl.int64) + tl.arange(0, BLOCK_C)
        n_bytes = tl.cdiv(end - start, 8)
        byte = (first_row - start) // 8 + tl.arange(0, BLOCK_M // 8)
        offsets = byte[:, None] + channels[None, :] * n_bytes
        if rows_per_group is not None:
            offsets += group * n_channels * tl.cdiv(rows_per_group, 8)
        valid = (byte < n_bytes)[:, None] & (channels < n_channels)[None, :]
    return offsets, valid


@triton.jit
def pack_bits(relu_mask, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_M, BLOCK_C], true where ReLU closed -> uint8, eight neighbours along the contiguous axis to a byte."""
    if CHANNELS_LAST:
        bits = tl.reshape(relu_mask.to(tl.int32), [BLOCK_M, BLOCK_C // 8, 8]) << tl.arange(0, 8)[None, None, :]
        packed = tl.sum(bits, axis=2)
    else:
        bits = tl.reshape(relu_mask.to(tl.int32), [BLOCK_M // 8, 8, BLOCK_C]) << tl.arange(0, 8)[None, :, None]
        packed = tl.sum(bits, axis=1)
    return packed.to(tl.uint8)


@triton.jit
def unpack_bits(packed, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The inverse of `pack_bits`: truth values [BLOCK_M, BLOCK_C]."""
    if CHANNELS_LAST:
        bits = packed[:, :, None].to(tl.int32) >> tl.arange(0, 8)[None, None, :]
    else:
        bits = packed[:, None, :].to(tl.int32) >> tl.arange(0, 8)[None, :, None]
    return tl.reshape(bits & 1, [BLOCK_M, BLOCK_C]) != 0
