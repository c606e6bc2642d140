"""Block sizes, grids and warps of the kernels, each with its reason.

A tensor is a matrix of `n_rows` = N·H·W rows and `n_channels` columns, whatever its layout. A tile is BLOCK_M rows by
BLOCK_C channels. Nothing here depends on the device, so a result does not depend on which GPU of a model computes it.
"""

from typing import NamedTuple

import triton

# 4 warps hold 16 elements of a tile per thread: two 16-byte loads per 16-bit tensor, both in flight before the first
# use, and three tensors plus fp32 accumulators still fit 128 registers.
TILE_ELEMENTS = 2048
NUM_WARPS = 4

# The gradient's sums hold up to four tensors and three accumulators: half a tile keeps them far below 128 registers,
# and the programs that fit then have as many bytes in flight. NCHW takes half a tile everywhere: each element has a
# 64-bit offset of its own there.
SMALL_TILE_ELEMENTS = 1024

# Registers a thread, of the 65,536 of an NVIDIA multiprocessor, for four, three and two programs of 128 threads.
MAX_REGISTERS, MAX_REGISTERS_NCHW, MAX_REGISTERS_FP64 = 128, 168, 255
MAX_REGISTERS_COMBINE = 255  # the combine kernels have a few programs in all

# 128 channels of a 16-bit type are two full 128-byte lines per row; wider tiles only shorten the rows' axis.
MAX_BLOCK_C = 128

# The ReLU mask packs eight channels (channels_last) or eight rows (NCHW) to a byte.
BITS_PER_BYTE = 8

# Reductions: 1024 programs are about 8 for each of 132 multiprocessors, two waves of the 4 that fit at 128 registers a
# thread; more programs only write more partial results. At least 64 rows each, so that those stay a small part.
TARGET_PROGRAMS = 1024
MIN_ROWS_PER_SPLIT = 64

# Combining is latency: many rows per step for few steps, 64 bytes of fp32 partials each, two sectors of a line.
COMBINE_BLOCK_C = 16
COMBINE_BLOCK_S = 128

# The single-read kernels keep what they have read in registers: a program of 8 warps has at 255 registers a thread all
# 65,536 of an NVIDIA multiprocessor. So one program fits on each, and no grid of more is ever resident at once.
SINGLE_READ_WARPS = 8
SINGLE_READ_REGISTERS = 255
SINGLE_READ_OPTIONS = {
    "num_warps": SINGLE_READ_WARPS,
    "maxnreg": SINGLE_READ_REGISTERS,
    "launch_cooperative_grid": True,  # or programs that wait for each other might not run at once
}

# 64 channels of a 16-bit type are a full line of 128 bytes per row; 8 elements a thread are one 16-byte load and four
# registers for as long as the program lives.
SINGLE_READ_BLOCK_C = 64
SINGLE_READ_ELEMENTS = 2048

# The most tiles of each tensor, by join: of the one to three tensors that are held, 112 to 128 registers a thread. The
# rest is for sums, vectors and addresses. On sm_90 one or two tiles more make the compiler move registers to memory; on
# sm_80 and sm_100 it then already moves up to 32 of the 255 (tests/test_single_read_machine_code.py).
SINGLE_READ_FORWARD_TILES = {"none": 32, "add": 32, "bn": 14}
SINGLE_READ_BACKWARD_TILES = {"none": 16, "add": 16, "bn": 10}

# Augmentation: 256 pixels of 3 channels (4 with the masked one) are 8 elements a thread, four programs a 32x32 image.
AUGMENT_PIXELS = 256


class Tiles(NamedTuple):
    """How one tensor is cut: tiles for the elementwise kernels, splits of rows for the reductions.

    Both are counted over all groups of rows; `group_splits` are the splits of a whole group.
    """

    block_m: int
    block_c: int
    n_row_tiles: int
    n_channel_tiles: int
    rows_per_split: int
    n_splits: int
    group_splits: int


def choose_tiles(
    n_rows: int,
    n_channels: int,
    n_spatial: int,
    channels_last: bool,
    rows_per_group: int,
    tile_elements: int = TILE_ELEMENTS,
) -> Tiles:
    """The tiles of a [n_rows, n_channels] tensor whose images have `n_spatial` = H·W pixels.

    With `rows_per_group` < n_rows none crosses the end of a group, whose statistics are its own. The groups share
    TARGET_PROGRAMS: more of them have fewer splits each, and as many partial results together.
    """
    if channels_last:  # channels are contiguous: fill them first
        block_c = min(MAX_BLOCK_C, max(BITS_PER_BYTE, triton.next_power_of_2(n_channels)))
    else:  # pixels are contiguous: whole images of few channels, as many channels as fill the tile
        tile_elements = min(tile_elements, SMALL_TILE_ELEMENTS)
        block_m = min(tile_elements, max(BITS_PER_BYTE, triton.next_power_of_2(n_spatial)))
        block_c = min(tile_elements // block_m, triton.next_power_of_2(n_channels))
    block_m = tile_elements // block_c
    n_channel_tiles = triton.cdiv(n_channels, block_c)

    full_groups = (n_rows - 1) // rows_per_group  # but the last, which may be smaller and have fewer parts
    last_rows = n_rows - full_groups * rows_per_group
    wanted_splits = max(1, TARGET_PROGRAMS // (n_channel_tiles * (full_groups + 1)))
    rows_per_split = max(triton.cdiv(rows_per_group, wanted_splits), MIN_ROWS_PER_SPLIT)
    rows_per_split = triton.cdiv(rows_per_split, block_m) * block_m
    return Tiles(
        block_m=block_m,
        block_c=block_c,
        n_row_tiles=full_groups * triton.cdiv(rows_per_group, block_m) + triton.cdiv(last_rows, block_m),
        n_channel_tiles=n_channel_tiles,
        rows_per_split=rows_per_split,
        n_splits=full_groups * triton.cdiv(rows_per_group, rows_per_split) + triton.cdiv(last_rows, rows_per_split),
        group_splits=triton.cdiv(rows_per_group, rows_per_split),
    )


class SingleReadTiles(NamedTuple):
    """How a single-read kernel cuts a tensor: its programs are `n_splits` of rows by `n_channel_tiles`, and each holds
    `n_tiles` tiles of BLOCK_M rows by BLOCK_C channels of every tensor.
    """

    block_m: int
    block_c: int
    n_tiles: int
    n_splits: int
    n_channel_tiles: int


def choose_single_read_tiles(
    n_rows: int, n_channels: int, n_multiprocessors: int, most_tiles: int
) -> SingleReadTiles | None:
    """The tiles with which all programs of a channels_last tensor run at once, one on each multiprocessor, or None.

    `most_tiles`: as many of each tensor fit in the registers of one program.
    """
    if n_channels % BITS_PER_BYTE != 0:  # whole bytes of ReLU bits, and 16-byte loads
        return None
    block_c = min(SINGLE_READ_BLOCK_C, triton.next_power_of_2(n_channels))
    block_m = SINGLE_READ_ELEMENTS // block_c
    n_channel_tiles = triton.cdiv(n_channels, block_c)
    most_splits = n_multiprocessors // n_channel_tiles
    if n_rows > most_splits * most_tiles * block_m:
        return None
    n_tiles = triton.cdiv(triton.cdiv(n_rows, block_m), most_splits)
    return SingleReadTiles(block_m, block_c, n_tiles, triton.cdiv(n_rows, n_tiles * block_m), n_channel_tiles)


def max_registers(channels_last: bool, element_size: int) -> int | None:
    """The most registers a thread may have of an NVIDIA GPU, or None to leave the number to ptxas.

    ptxas spills a register or two to memory for the sake of one program more; it does not where a limit is set. Left to
    itself it takes fewer than MAX_REGISTERS, without spilling, on the fast path: channels_last in 16-bit types.
    """
    if element_size == 8:
        return MAX_REGISTERS_FP64
    if channels_last:
        return None if element_size == 2 else MAX_REGISTERS
    return MAX_REGISTERS_NCHW
