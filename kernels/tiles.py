"""Block sizes, grids and warps of the kernels, each with its reason.

A tensor is a matrix of `n_rows` = N·H·W rows and `n_channels` columns, whatever its layout. A tile is BLOCK_M rows by
BLOCK_C channels. Nothing here depends on the device, so a result does not depend on which GPU of a model computes it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# A thread has 8 elements of a tile: one 16-byte load of a 16-bit tensor. A tile of an elementwise pass is for 4 warps,
# one of a reduction in channels_last for 8, because half as many programs write half as many partial results.
THREAD_ELEMENTS = 8
NUM_WARPS, REDUCTION_WARPS = 4, 8

# Registers per thread, so that three programs of 4 warps or two of 8 fit on an NVIDIA multiprocessor with its 65,536.
# Without a limit ptxas saves registers and loads each tile just before its use. It moves some to memory if it may use
# 128 in 16-bit types, or less than 180 from sm_100 on. The combine kernels have few programs: all registers are theirs.
MAX_REGISTERS, MAX_REGISTERS_REDUCTION, MAX_REGISTERS_REDUCTION_16_BITS, ALL_REGISTERS = 168, 128, 124, 255

# 64 channels of a 16-bit type are a full 128-byte line per row. Of wide layers 32, two sectors: the maps are small, and
# a program then has more rows, so that there are fewer partial results to merge.
MAX_BLOCK_C = 64
WIDE_LAYER, WIDE_BLOCK_C = 256, 32

# The ReLU mask packs eight channels (channels_last) or eight rows (NCHW) to a byte.
BITS_PER_BYTE = 8

# Bytes that each thread loads at once, over all tensors. An elementwise pass has more, since each of its programs loads
# vectors and merges partial results.
REDUCE_BYTES, PASS_BYTES = 128, 256

# Reductions: about one and two programs for each of 132 multiprocessors, which are resident together on most GPUs. More
# programs only write more partial results. Those of the statistics do more once per program, so there are fewer.
STATISTICS_PROGRAMS, REDUCE_PROGRAMS = 128, 256
# Elementwise passes: programs take fewer tiles before there are fewer of them than this.
PASS_PROGRAMS = 256

# Up to this many partial results are merged by each program of the second pass, in less time than a launch takes.
FEW_SPLITS = 32
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


# The most tiles of each tensor, by join: of the one to three tensors that are held, 108 to 128 registers a thread. The
# rest is for sums, vectors and addresses. On sm_90 one or two tiles more make the compiler move registers to memory; on
# sm_80 and sm_100 it then already moves up to 32 of the 255 (tests/test_single_read_machine_code.py).
SINGLE_READ_FORWARD_TILES = {"none": 32, "add": 32, "bn": 14}
SINGLE_READ_BACKWARD_TILES = {"none": 16, "add": 16, "bn": 9}

# Augmentation: 256 pixels of 3 channels (4 with the masked one) are 8 elements a thread, four programs a 32x32 image.
AUGMENT_PIXELS = 256


class Tile(NamedTuple):
    """What a kernel is compiled for: the layout of its tensors, and a program's `n_tiles` tiles, all loaded at once.

    For Triton the fields are constants.
    """

    n_channels: tl.constexpr
    channels_last: tl.constexpr
    block_m: tl.constexpr
    block_c: tl.constexpr
    n_tiles: tl.constexpr

    @classmethod
    def of(cls, n_channels: int, channels_last: bool, block_m: int, block_c: int, n_tiles: int = 1) -> "Tile":
        return cls(*map(tl.constexpr, (n_channels, channels_last, block_m, block_c, n_tiles)))

    @property
    def num_warps(self) -> int:
        return self.block_m.value * self.block_c.value // (32 * THREAD_ELEMENTS)

    @property
    def values(self) -> tuple[int, bool, int, int, int]:
        return tuple(field.value for field in self)


class Tiles(NamedTuple):
    """How a tensor is cut for a kernel.

    `n_parts` are splits of rows in a reduction, of `rows_per_part` rows, and the tiles of a program in an elementwise
    pass; they are counted over all groups of rows, and `group_parts` are those of a whole group.
    """

    tile: Tile
    rows_per_part: int
    n_parts: int
    group_parts: int
    n_channel_tiles: int

    @property
    def n_programs(self) -> int:
        return self.n_parts * self.n_channel_tiles


def choose_blocks(n_channels: int, n_spatial: int, channels_last: bool, num_warps: int) -> tuple[int, int]:
    """BLOCK_M and BLOCK_C of a tensor of `n_channels` whose images have `n_spatial` = H·W pixels."""
    elements = num_warps * 32 * THREAD_ELEMENTS
    if channels_last:  # channels are contiguous: fill them first
        most = MAX_BLOCK_C if n_channels < WIDE_LAYER else WIDE_BLOCK_C
        block_c = min(most, max(BITS_PER_BYTE, triton.next_power_of_2(n_channels)))
    else:  # pixels are contiguous: whole images of few channels, as many channels as fill the tile
        block_m = min(elements, max(BITS_PER_BYTE, triton.next_power_of_2(n_spatial)))
        block_c = min(elements // block_m, triton.next_power_of_2(n_channels))
    return elements // block_c, block_c


def choose_tiles(
    n_rows: int,
    n_channels: int,
    n_spatial: int,
    channels_last: bool,
    rows_per_group: int,
    tile_bytes: int,
    reduction_programs: int = 0,
) -> Tiles:
    """The tiles of a [n_rows, n_channels] tensor.

    `tile_bytes`: a thread's part of a tile, of all tensors that are read. `reduction_programs`: the approximate number
    of programs of a reduction; 0 for an elementwise pass.

    With `rows_per_group` < n_rows none crosses the end of a group, whose statistics are its own. The groups share the
    programs: more of them have fewer splits each, and as many partial results together.
    """
    num_warps = REDUCTION_WARPS if reduction_programs and channels_last else NUM_WARPS
    block_m, block_c = choose_blocks(n_channels, n_spatial, channels_last, num_warps)
    n_programs = PASS_PROGRAMS
    if reduction_programs:  # as many threads, whatever the warps of a program
        n_programs = reduction_programs * REDUCTION_WARPS // num_warps
    n_channel_tiles = triton.cdiv(n_channels, block_c)
    full_groups = (n_rows - 1) // rows_per_group  # but the last, which may be smaller and have fewer parts
    last_rows = n_rows - full_groups * rows_per_group
    wanted_parts = max(1, n_programs // (n_channel_tiles * (full_groups + 1)))
    # In NCHW every element has a 64-bit address of its own, and there are no registers for more than one tile.
    bytes_ahead = REDUCE_BYTES if reduction_programs else PASS_BYTES
    n_tiles = 1 << max(0, (bytes_ahead // tile_bytes).bit_length() - 1) if channels_last else 1
    if n_tiles > 1 and n_channels % block_c:  # masks of channels take registers, too
        n_tiles //= 2
    while n_tiles > 1 and rows_per_group < wanted_parts * n_tiles * block_m:
        n_tiles //= 2
    rows_per_part = n_tiles * block_m
    if reduction_programs:
        rows_per_part *= triton.cdiv(triton.cdiv(rows_per_group, wanted_parts), rows_per_part)
    group_parts = triton.cdiv(rows_per_group, rows_per_part)
    n_parts = full_groups * group_parts + triton.cdiv(last_rows, rows_per_part)
    tile = Tile.of(n_channels, channels_last, block_m, block_c, n_tiles)
    return Tiles(tile, rows_per_part, n_parts, group_parts, n_channel_tiles)


def merge_blocks(n_splits: int) -> dict[str, int]:
    """How many partial results are merged in a step: all, if they fit, so that every load is on its way together."""
    block_s = min(COMBINE_BLOCK_S, triton.next_power_of_2(n_splits))
    return {"N_STEPS": triton.cdiv(n_splits, block_s), "BLOCK_S": block_s}


def choose_single_read_tiles(n_rows: int, n_channels: int, n_multiprocessors: int, most_tiles: int) -> Tiles | None:
    """The tiles with which all programs of a channels_last tensor run at once, one on each multiprocessor, or None.

    `most_tiles`: as many of each tensor fit in the registers of one program.
    """
    if n_channels % BITS_PER_BYTE != 0:  # whole bytes of ReLU bits, and 16-byte loads
        return None
    block_c = min(MAX_BLOCK_C, triton.next_power_of_2(n_channels))
    block_m = SINGLE_READ_WARPS * 32 * THREAD_ELEMENTS // block_c
    n_channel_tiles = triton.cdiv(n_channels, block_c)
    most_splits = n_multiprocessors // n_channel_tiles
    if n_rows > most_splits * most_tiles * block_m:
        return None
    n_tiles = triton.cdiv(triton.cdiv(n_rows, block_m), most_splits)
    rows_per_split = n_tiles * block_m
    n_splits = triton.cdiv(n_rows, rows_per_split)
    tile = Tile.of(n_channels, True, block_m, block_c, n_tiles)
    return Tiles(tile, rows_per_split, n_splits, n_splits, n_channel_tiles)


def max_registers(tile: Tile | None, element_size: int, capability: int) -> int:
    """The most registers that a thread may have on an NVIDIA GPU; without a tile, of a combine kernel."""
    if tile is None or element_size == 8 or capability >= 100:
        return ALL_REGISTERS
    if tile.num_warps == NUM_WARPS:
        return MAX_REGISTERS
    return MAX_REGISTERS_REDUCTION_16_BITS if element_size == 2 else MAX_REGISTERS_REDUCTION
