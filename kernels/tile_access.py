"""What the forward and the backward kernels share: where a tile lies in memory, its channel vectors, the ReLU bits.

With ghost batches, rows fall into groups of `rows_per_group`, the last of which may be smaller; None stands for one
group of all rows, and compiles to code that knows nothing of groups. Parts of the rows, tiles or splits, are counted
group after group, and none crosses the end of its group.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait until the previous kernel has ended and its results are visible, then let the next one start.

    With programmatic dependent launch kernels overlap: no memory may be accessed before this call.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wide(n):
    """Return n as int64, even if it is 1, which Triton turns into a constant."""
    return tl.full([], 0, tl.int64) + n


@triton.jit
def divide(a, b):
    """a / b, correctly rounded. On a GPU `/` is so in fp64 alone; in fp32 it is up to 2 ulp off.

    It calls a subroutine, across which registers must be kept: not where loads of a tile are on their way.
    """
    if b.dtype == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


@triton.jit
def group_of_rows(group, n_rows, rows_per_group):
    """First row of a group of rows, and the row behind its last."""
    if rows_per_group is None:
        start = 0
        end = n_rows
    else:
        start = wide(group) * rows_per_group
        end = tl.minimum(start + rows_per_group, n_rows)
    return start, end


@triton.jit
def locate(part, rows_per_part, n_rows, rows_per_group):
    """A part of the rows: its group, first row (int64), and how many rows it has."""
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
    """The channels of a tile of channels, and which of them exist."""
    offs_c = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    if N_CHANNELS % BLOCK_C == 0:
        mask_c = tl.full([BLOCK_C], 1, tl.int1)
    else:
        mask_c = offs_c < N_CHANNELS
    return offs_c, mask_c


@triton.jit
def part_of_program(TILE: tl.constexpr, REVERSED: tl.constexpr = False):
    """Return the part of the rows and the tile of channels of a program; tiles of channels vary fastest.

    REVERSED counts from the last program, so that a second pass begins with what the first left in the L2 cache.
    """
    index = tl.program_id(0)
    if REVERSED:
        index = tl.num_programs(0) - 1 - index
    N_CHANNEL_TILES: tl.constexpr = (TILE.n_channels + TILE.block_c - 1) // TILE.block_c
    return index // N_CHANNEL_TILES, index % N_CHANNEL_TILES


@triton.jit
def tile_pointers(ptr, first_row, offs_c, n_spatial, TILE: tl.constexpr):
    """Pointers [BLOCK_M, BLOCK_C] to the rows from `first_row` (int64) and the channels `offs_c`.

    Row m is pixel m mod H·W of image m div H·W, in both layouts.
    """
    offs_m = tl.arange(0, TILE.block_m)
    if TILE.channels_last:
        # Counted in 32 bits from the tile's first element, by numbers that all tiles share.
        pointers = ptr + first_row * TILE.n_channels + (offs_m[:, None] * TILE.n_channels + offs_c[None, :])
    else:
        # One 64-bit division per tile; the rows inside it are counted from their first image in 32 bits.
        first_image = first_row // n_spatial
        pixels = (first_row % n_spatial).to(tl.int32) + offs_m
        rows = (first_image + pixels // n_spatial) * TILE.n_channels * n_spatial + pixels % n_spatial
        pointers = ptr + (rows[:, None] + offs_c.to(tl.int64)[None, :] * n_spatial)
    return pointers


@triton.jit
def tile_mask(n_own, mask_c, TILE: tl.constexpr):
    """Which elements [BLOCK_M, BLOCK_C] exist of a tile with `n_own` rows."""
    return (tl.arange(0, TILE.block_m) < n_own)[:, None] & mask_c[None, :]


@triton.jit
def load_tile(ptr, first_row, n_own, offs_c, mask_c, n_spatial, TILE: tl.constexpr, LAST_USE: tl.constexpr = False):
    """[BLOCK_M, BLOCK_C] from `first_row` on; rows behind the first `n_own` are 0. Without `ptr` just 0."""
    if ptr is None:
        tile = 0
    else:
        EVICTION: tl.constexpr = "evict_first" if LAST_USE else ""
        pointers = tile_pointers(ptr, first_row, offs_c, n_spatial, TILE)
        tile = tl.load(pointers, mask=tile_mask(n_own, mask_c, TILE), other=0.0, eviction_policy=EVICTION)
    return tile


@triton.jit
def load_tiles(ptr, first_row, n_own, offs_c, mask_c, n_spatial, TILE: tl.constexpr, LAST_USE: tl.constexpr = False):
    """N_TILES tiles, all of which are on their way before the first is used."""
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
def bit_offsets(first_row, n_own, channel_tile, group, n_rows, rows_per_group, TILE: tl.constexpr):
    """Byte offsets (int64) and validity of a tile's ReLU bits; tiles start at multiples of eight rows and channels.

    channels_last: [n_rows, ceil(n_channels / 8)] bytes, bit i of a byte is its channel 8·byte + i.
    NCHW:          [n_channels, ceil(n_rows / 8)] bytes, bit i of a byte is its row 8·byte + i. Of groups, whose rows
                   may be no multiple of eight, each has such bytes of its own rows, one group after the other.
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
    """The packed ReLU bits of a tile. Without `ptr` just 0."""
    if ptr is None:
        packed = 0
    else:
        offsets, valid = bit_offsets(first_row, n_own, channel_tile, group, n_rows, rows_per_group, TILE)
        packed = tl.load(ptr + offsets, mask=valid, other=0)
    return packed


@triton.jit
def pack_bits(relu_mask, TILE: tl.constexpr):
    """[BLOCK_M, BLOCK_C], true where ReLU closed -> uint8, eight neighbours along the contiguous axis to a byte."""
    if TILE.channels_last:
        bits = tl.reshape(relu_mask.to(tl.int32), [TILE.block_m, TILE.block_c // 8, 8])
        packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2)
    else:
        bits = tl.reshape(relu_mask.to(tl.int32), [TILE.block_m // 8, 8, TILE.block_c])
        packed = tl.sum(bits << tl.arange(0, 8)[None, :, None], axis=1)
    return packed.to(tl.uint8)


@triton.jit
def unpack_bits(packed, TILE: tl.constexpr):
    """The inverse of `pack_bits`: truth values [BLOCK_M, BLOCK_C]."""
    if TILE.channels_last:
        bits = packed[:, :, None].to(tl.int32) >> tl.arange(0, 8)[None, None, :]
    else:
        bits = packed[:, None, :].to(tl.int32) >> tl.arange(0, 8)[None, :, None]
    return tl.reshape(bits & 1, [TILE.block_m, TILE.block_c]) != 0
