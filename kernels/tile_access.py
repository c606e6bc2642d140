"""What the forward and the backward kernels share: where a tile lies in memory, its channel vectors, the ReLU bits."""

import triton
import triton.language as tl


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
    n_rows,
    n_channels,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Byte offsets (int64) and validity of a tile's ReLU bits; tiles start at multiples of eight rows and channels.

    channels_last: [n_rows, ceil(n_channels / 8)] bytes, bit i of a byte is its channel 8·byte + i.
    NCHW:          [n_channels, ceil(n_rows / 8)] bytes, bit i of a byte is its row 8·byte + i.
    """
    if CHANNELS_LAST:
        rows = first_row + tl.arange(0, BLOCK_M)
        n_bytes = tl.cdiv(n_channels, 8)
        byte = first_channel // 8 + tl.arange(0, BLOCK_C // 8)
        offsets = rows[:, None] * n_bytes + byte[None, :]
        valid = (rows < n_rows)[:, None] & (byte < n_bytes)[None, :]
    else:
        channels = first_channel.to(tl.int64) + tl.arange(0, BLOCK_C)
        n_bytes = tl.cdiv(n_rows, 8)
        byte = first_row // 8 + tl.arange(0, BLOCK_M // 8)
        offsets = byte[:, None] + channels[None, :] * n_bytes
        valid = (byte < n_bytes)[:, None] & (channels < n_channels)[None, :]
    return offsets, valid


@triton.jit
def pack_bits(drop, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_M, BLOCK_C], true where ReLU closed -> uint8, eight neighbours along the contiguous axis to a byte."""
    if CHANNELS_LAST:
        bits = tl.reshape(drop.to(tl.int32), [BLOCK_M, BLOCK_C // 8, 8]) << tl.arange(0, 8)[None, None, :]
        packed = tl.sum(bits, axis=2)
    else:
        bits = tl.reshape(drop.to(tl.int32), [BLOCK_M // 8, 8, BLOCK_C]) << tl.arange(0, 8)[None, :, None]
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
