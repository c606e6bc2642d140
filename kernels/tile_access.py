"""Access to tiles, channel vectors and ReLU bits in memory, for the forward and the backward kernels.

With ghost batches, rows form groups of `rows_per_group`; the last group may be smaller. None means one group of all
rows, and compiles to code without groups. Parts of the rows (tiles or splits) are numbered group after group, and no
part crosses the end of its group.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait until the previous kernel has ended and its results are visible, then let the next one start.

    With programmatic dependent launch, kernels overlap: a kernel must not access memory before this call.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wide(n):
    """Return n as int64, even an n of 1, which Triton turns into a constant."""
    return tl.full([], 0, tl.int64) + n


@triton.jit
def divide(a, b):
    """Return a / b, correctly rounded. On a GPU `/` is correctly rounded only in fp64; in fp32 it is up to 2 ulp off.

    Do not use it while loads of a tile are in flight: it calls a subroutine, across which registers must be kept.
    """
    if b.dtype == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


@triton.jit
def group_of_rows(group, n_rows, rows_per_group):
    """Return the first row of a group, and the row after its last."""
    if rows_per_group is None:
        start = 0
        end = n_rows
    else:
        start = wide(group) * rows_per_group
        end = tl.minimum(start + rows_per_group, n_rows)
    return start, end


@triton.jit
def locate(part, rows_per_part, n_rows, rows_per_group):
    """Return the group of a part of the rows, its first row (int64) and its number of rows."""
    if rows_per_group is None:
        group = 0
        first_row = wide(part) * rows_per_part
        end = n_rows
    else:
        parts_per_group = tl.cdiv(rows_per_group, rows_per_part)
        group = wide(part // parts_per_group)
        start, end = group_of_rows(group, n_rows, rows_per_group)
        first_row = start + wide(part % parts_per_group) * rows_per_part
    return group, first_row, tl.minimum(end - first_row, rows_per_part).to(tl.int32)


@triton.jit
def channels_of(channel_tile, N_CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the channels of a channel tile, and which of them exist."""
    offs_c = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    if N_CHANNELS % BLOCK_C == 0:
        mask_c = tl.full([BLOCK_C], 1, tl.int1)
    else:
        mask_c = offs_c < N_CHANNELS
    return offs_c, mask_c


@triton.jit
def part_of_program(TILE: tl.constexpr, REVERSED: tl.constexpr = False):
    """Return a program's part of the rows and its channel tile; channel tiles vary fastest.

    REVERSED counts from the last program, so that a second pass begins with the rows that are still in the L2 cache.
    """
    index = tl.program_id(0)
    if REVERSED:
        index = tl.num_programs(0) - 1 - index
    N_CHANNEL_TILES: tl.constexpr = (TILE.n_channels + TILE.block_c - 1) // TILE.block_c
    return index // N_CHANNEL_TILES, index % N_CHANNEL_TILES


@triton.jit
def tile_pointers(ptr, first_row, offs_c, n_spatial, TILE: tl.constexpr):
    """Return pointers [BLOCK_M, BLOCK_C] to the rows from `first_row` (int64) and the channels `offs_c`.

    Row m is pixel m mod H·W of image m div H·W, in both layouts.
    """
    offs_m = tl.arange(0, TILE.block_m)
    if TILE.channels_last:
        # 32-bit offsets from the tile's first element, the same for every tile.
        pointers = ptr + first_row * TILE.n_channels + (offs_m[:, None] * TILE.n_channels + offs_c[None, :])
    else:
        # One 64-bit division per tile; inside it, pixels are counted in 32 bits from the first image.
        first_image = first_row // n_spatial
        pixels = (first_row % n_spatial).to(tl.int32) + offs_m
        rows = (first_image + pixels // n_spatial) * TILE.n_channels * n_spatial + pixels % n_spatial
        pointers = ptr + (rows[:, None] + offs_c.to(tl.int64)[None, :] * n_spatial)
    return pointers


@triton.jit
def tile_mask(n_own, mask_c, TILE: tl.constexpr):
    """Return which elements [BLOCK_M, BLOCK_C] of a tile with `n_own` rows exist."""
    return (tl.arange(0, TILE.block_m) < n_own)[:, None] & mask_c[None, :]


@triton.jit
def load_tile(ptr, first_row, n_own, offs_c, mask_c, n_spatial, TILE: tl.constexpr, LAST_USE: tl.constexpr = False):
    """Load [BLOCK_M, BLOCK_C] from `first_row` on; rows after the first `n_own` are 0. Without `ptr`, return 0."""
    if ptr is None:
        tile = 0
    else:
        EVICTION: tl.constexpr = "evict_first" if LAST_USE else ""
        pointers = tile_pointers(ptr, first_row, offs_c, n_spatial, TILE)
        tile = tl.load(pointers, mask=tile_mask(n_own, mask_c, TILE), other=0.0, eviction_policy=EVICTION)
    return tile


@triton.jit
def load_tiles(ptr, first_row, n_own, offs_c, mask_c, n_spatial, TILE: tl.constexpr, LAST_USE: tl.constexpr = False):
    """Load N_TILES tiles; all loads are in flight before the first tile is used."""
    tiles = ()
    for k in tl.static_range(TILE.n_tiles):
        row = k * TILE.block_m
        tiles += (load_tile(ptr, first_row + row, n_own - row, offs_c, mask_c, n_spatial, TILE, LAST_USE),)
    return tiles


@triton.jit
def store_tile(ptr, tile, first_row, n_own, offs_c, mask_c, n_spatial, TILE: tl.constexpr):
    pointers = tile_pointers(ptr, first_row, offs_c, n_spatial, TILE)
    tl.store(pointers, tile, mask=tile_mask(n_own, mask_c, TILE))


@triton.jit
def load_channel(ptr, offs_c, mask_c, default: tl.constexpr, acc_type: tl.constexpr):
    """Load a per-channel vector in the accumulation type; return `default` for each channel if the layer has none."""
    if ptr is None:
        value = tl.full(offs_c.shape, default, acc_type)
    else:
        value = tl.load(ptr + offs_c, mask=mask_c, other=default).to(acc_type)
    return value


@triton.jit
def normalize(x, mean, scale, bias):
    """Return (x - mean)·scale + bias (N1). With an explicit fma, the backward recomputes ReLU's sign exactly."""
    return tl.fma(x - mean[None, :], tl.broadcast_to(scale[None, :], x.shape), tl.broadcast_to(bias[None, :], x.shape))


@triton.jit
def bit_offsets(first_row, n_own, channel_tile, group, n_rows, rows_per_group, TILE: tl.constexpr):
    """Return byte offsets (int64) of a tile's ReLU bits, and which exist; tiles start at multiples of 8.

    channels_last: [n_rows, ceil(n_channels / 8)] bytes; bit i of a byte is channel 8·byte + i.
    NCHW:          [n_channels, ceil(n_rows / 8)] bytes; bit i of a byte is row 8·byte + i. Each group has such an
                   array of its own, one after the other, because its rows need not be a multiple of eight.
    """
    if TILE.channels_last:
        N_BYTES: tl.constexpr = (TILE.n_channels + 7) // 8
        offs_m = tl.arange(0, TILE.block_m)
        byte = channel_tile * (TILE.block_c // 8) + tl.arange(0, TILE.block_c // 8)
        offsets = first_row * N_BYTES + (offs_m[:, None] * N_BYTES + byte[None, :])
        valid = (offs_m < n_own)[:, None] & (byte < N_BYTES)[None, :]
    else:
        start, end = group_of_rows(group, n_rows, rows_per_group)
        channels = wide(channel_tile) * TILE.block_c + tl.arange(0, TILE.block_c)
        n_bytes = tl.cdiv(end - start, 8)
        byte = (first_row - start) // 8 + tl.arange(0, TILE.block_m // 8)
        offsets = byte[:, None] + channels[None, :] * n_bytes
        if rows_per_group is not None:
            offsets += group * TILE.n_channels * tl.cdiv(rows_per_group, 8)
        valid = (byte < n_bytes)[:, None] & (channels < TILE.n_channels)[None, :]
    return offsets, valid


@triton.jit
def load_bits(ptr, first_row, n_own, channel_tile, group, n_rows, rows_per_group, TILE: tl.constexpr):
    """Load a tile's packed ReLU bits. Without `ptr`, return 0."""
    if ptr is None:
        packed = 0
    else:
        offsets, valid = bit_offsets(first_row, n_own, channel_tile, group, n_rows, rows_per_group, TILE)
        packed = tl.load(ptr + offsets, mask=valid, other=0)
    return packed


@triton.jit
def pack_bits(relu_mask, TILE: tl.constexpr):
    """Pack [BLOCK_M, BLOCK_C], true where ReLU's output is 0, into uint8: eight neighbors on the contiguous axis."""
    if TILE.channels_last:
        bits = tl.reshape(relu_mask.to(tl.int32), [TILE.block_m, TILE.block_c // 8, 8])
        packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2)
    else:
        bits = tl.reshape(relu_mask.to(tl.int32), [TILE.block_m // 8, 8, TILE.block_c])
        packed = tl.sum(bits << tl.arange(0, 8)[None, :, None], axis=1)
    return packed.to(tl.uint8)


@triton.jit
def unpack_bits(packed, TILE: tl.constexpr):
    """Return the mask [BLOCK_M, BLOCK_C] that `pack_bits` packed."""
    if TILE.channels_last:
        bits = packed[:, :, None].to(tl.int32) >> tl.arange(0, 8)[None, None, :]
    else:
        bits = packed[:, None, :].to(tl.int32) >> tl.arange(0, 8)[None, :, None]
    return tl.reshape(bits & 1, [TILE.block_m, TILE.block_c]) != 0
