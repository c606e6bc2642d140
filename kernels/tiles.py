"""Block sizes, grids and warps of the kernels, each with its reason.

A tensor is a matrix of `n_rows` = N·H·W rows and `n_channels` columns, whatever its layout. A tile is BLOCK_M rows by
BLOCK_C channels. Nothing here depends on the device, so a result does not depend on which GPU of a model computes it.
"""

from typing import NamedTuple

import triton

# 4 warps hold 8 elements of a tile per thread: one 16-byte load of a 16-bit tensor.
NUM_WARPS = 4
TILE_ELEMENTS = 1024

# Registers a thread, of the 65,536 of an NVIDIA multiprocessor, for four, three and two programs of 128 threads.
# Without a limit ptxas saves registers, and loads each tile just before its use.
MAX_REGISTERS, MAX_REGISTERS_NCHW, MAX_REGISTERS_FP64 = 128, 168, 255
MAX_REGISTERS_COMBINE = 255  # the combine kernels have a few programs in all

# 64 channels of a 16-bit type are a full 128-byte line per row. Of wide layers 32, two sectors: the maps are small, and
# a program then has more rows, so that there are fewer partial results to merge.
MAX_BLOCK_C = 64
WIDE_LAYER, WIDE_BLOCK_C = 256, 32

# The ReLU mask packs eight channels (channels_last) or eight rows (NCHW) to a byte.
BITS_PER_BYTE = 8

# Bytes that a thread has on their way, in 16-byte loads: of x in the statistics; of all tensors in the gradient's sums
# and in an elementwise pass, where more tiles share the loads of a program's vectors; of those of one that merges
# statistics first, for which it takes still more.
STATISTICS_BYTES, REDUCE_BYTES, PASS_BYTES, MERGING_PASS_BYTES = 128, 128, 192, 256

# Reductions: about two and four programs for each of 132 multiprocessors, which are resident together on most GPUs.
# More programs only write more partial results, and each has a cost of its own, of which the statistics have more.
STATISTICS_PROGRAMS, REDUCE_PROGRAMS = 256, 512
# Elementwise passes: programs take fewer tiles before there are fewer of them than this.
PASS_PROGRAMS = 256

# So many partial results each program of the second pass merges for itself, in less time than a launch takes: of
# statistics, which take more steps to merge, and of the gradient's sums.
FEW_STATISTICS, FEW_SUMS = 32, 64
# Else they are merged at once, [splits, channels], by programs of few channels.
COMBINE_BLOCK_S = 512
COMBINE_BLOCK_C = 4

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
    """How a tensor is cut for a kernel: a program takes `n_tiles` tiles of BLOCK_M rows by BLOCK_C channels at once.

    `n_parts` are splits of rows in a reduction, of `rows_per_part` rows, and the tiles of a program in an elementwise
    pass; they are counted over all groups of rows, and `group_parts` are those of a whole group.
    """

    block_m: int
    block_c: int
    n_tiles: int
    rows_per_part: int
    n_parts: int
    group_parts: int
    n_channel_tiles: int

    @property
    def n_programs(self) -> int:
        return self.n_parts * self.n_channel_tiles


def choose_blocks(n_channels: int, n_spatial: int, channels_last: bool) -> tuple[int, int]:
    """BLOCK_M and BLOCK_C of a tensor of `n_channels` whose images have `n_spatial` = H·W pixels."""
    if channels_last:  # channels are contiguous: fill them first
        most = MAX_BLOCK_C if n_channels < WIDE_LAYER else WIDE_BLOCK_C
        block_c = min(most, max(BITS_PER_BYTE, triton.next_power_of_2(n_channels)))
    else:  # pixels are contiguous: whole images of few channels, as many channels as fill the tile
        block_m = min(TILE_ELEMENTS, max(BITS_PER_BYTE, triton.next_power_of_2(n_spatial)))
        block_c = min(TILE_ELEMENTS // block_m, triton.next_power_of_2(n_channels))
    return TILE_ELEMENTS // block_c, block_c


def choose_tiles(
    n_rows: int,
    n_channels: int,
    n_spatial: int,
    channels_last: bool,
    rows_per_group: int,
    bytes_ahead: int,
    tile_bytes: int,
    n_programs: int,
    reduces: bool,
) -> Tiles:
    """The tiles of a [n_rows, n_channels] tensor, for a kernel that reads `tile_bytes` of a thread's part of a tile.

    `bytes_ahead` are those that the thread may have on their way.

    With `rows_per_group` < n_rows none crosses the end of a group, whose statistics are its own. The groups share
    `n_programs`: more of them have fewer splits each, and as many partial results together.
    """
    block_m, block_c = choose_blocks(n_channels, n_spatial, channels_last)
    n_channel_tiles = triton.cdiv(n_channels, block_c)
    full_groups = (n_rows - 1) // rows_per_group  # but the last, which may be smaller and have fewer parts
    last_rows = n_rows - full_groups * rows_per_group
    wanted_parts = max(1, n_programs // (n_channel_tiles * (full_groups + 1)))
    # In NCHW every element has a 64-bit address of its own, and there are no registers for more than one tile.
    n_tiles = 1 << max(0, (bytes_ahead // tile_bytes).bit_length() - 1) if channels_last else 1
    while n_tiles > 1 and rows_per_group < wanted_parts * n_tiles * block_m:
        n_tiles //= 2
    rows_per_part = n_tiles * block_m
    if reduces:
        rows_per_part *= triton.cdiv(triton.cdiv(rows_per_group, wanted_parts), rows_per_part)
    group_parts = triton.cdiv(rows_per_group, rows_per_part)
    n_parts = full_groups * group_parts + triton.cdiv(last_rows, rows_per_part)
    return Tiles(block_m, block_c, n_tiles, rows_per_part, n_parts, group_parts, n_channel_tiles)


def merge_blocks(n_splits: int) -> dict[str, int]:
    """How many partial results are merged in a step: all, if they fit, so that every load is on its way together."""
    block_s = min(COMBINE_BLOCK_S, triton.next_power_of_2(n_splits))
    return {"N_STEPS": triton.cdiv(n_splits, block_s), "BLOCK_S": block_s}


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


def max_registers(channels_last: bool, element_size: int) -> int:
    """The most registers a thread may have of an NVIDIA GPU."""
    if element_size == 8:
        return MAX_REGISTERS_FP64
    return MAX_REGISTERS if channels_last else MAX_REGISTERS_NCHW
