"""Block sizes, grids and warps of the kernels, each with its reason.

A tensor is a matrix of `n_rows` = N·H·W rows and `n_channels` columns, in either layout. A tile is BLOCK_M rows by
BLOCK_C channels. Tiles do not depend on the GPU, except that single-read ones depend on its number of multiprocessors.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# A thread has 8 elements of a tile: one 16-byte load of a 16-bit tensor. Programs have 4 warps, but those of reductions
# in channels_last have 8, because half as many programs write half as many partial results.
THREAD_ELEMENTS = 8
NUM_WARPS, REDUCTION_WARPS = 4, 8

# Registers per thread, so that three programs of 4 warps or two of 8 fit on an NVIDIA multiprocessor with its 65,536.
# Without a limit, ptxas saves registers and loads each tile just before its use. It spills at a limit of 128 in 16-bit
# types, and at any below 180 from sm_100 on. The combine kernels have few programs, so their threads may use all.
MAX_REGISTERS, MAX_REGISTERS_REDUCTION, MAX_REGISTERS_REDUCTION_16_BITS, ALL_REGISTERS = 168, 128, 124, 255

# 64 channels of a 16-bit type are a full 128-byte line per row. Wide layers use 32, two sectors: their maps are small,
# and with more rows per program there are fewer partial results to merge.
MAX_BLOCK_C = 64
WIDE_LAYER, WIDE_BLOCK_C = 256, 32

# The ReLU mask packs eight channels (channels_last) or eight rows (NCHW) to a byte.
BITS_PER_BYTE = 8

# Bytes that each thread loads at once, over all tensors. Elementwise passes load more, because each of their programs
# also loads vectors and merges partial results.
REDUCE_BYTES, PASS_BYTES = 128, 256

# Reductions: about one and two programs for each of 132 multiprocessors, all resident together on most GPUs. More
# programs would only write more partial results. Statistics use fewer, because each program has more fixed work.
STATISTICS_PROGRAMS, REDUCE_PROGRAMS = 128, 256
# Elementwise passes: a program gets fewer tiles if there would be fewer programs than this.
PASS_PROGRAMS = 256

# Each program of the second pass merges up to this many partial results, in less time than a launch takes.
FEW_SPLITS = 32
# More are merged by a combine kernel, [splits, channels] at once, with few channels per program.
COMBINE_BLOCK_S = 512
COMBINE_BLOCK_C = 4

# The single-read kernels keep their tiles in registers. At 255 registers per thread, a program of 8 warps uses all
# 65,536 of an NVIDIA multiprocessor, so each holds one program, and a larger grid is never resident at once.
SINGLE_READ_WARPS = 8
SINGLE_READ_REGISTERS = 255
SINGLE_READ_OPTIONS = {
    "num_warps": SINGLE_READ_WARPS,
    "maxnreg": SINGLE_READ_REGISTERS,
    "launch_cooperative_grid": True,  # else programs that wait for each other might not run at the same time
}


# The most tiles of each tensor, by join: together the one to three tensors held use 108 to 128 registers per thread.
# The rest is for sums, vectors and addresses. On sm_90 the compiler spills with one or two tiles more; on sm_80 and
# sm_100 it already spills up to 32 of the 255 with these (tests/test_single_read_machine_code.py).
SINGLE_READ_FORWARD_TILES = {"none": 32, "add": 32, "bn": 14}
SINGLE_READ_BACKWARD_TILES = {"none": 16, "add": 16, "bn": 9}

# Augmentation: 256 pixels of 3 channels (4 with the masked one) are 8 elements per thread, a 32x32 image four programs.
AUGMENT_PIXELS = 256


class Tile(NamedTuple):
    """The layout and the tiles that a kernel is compiled for; a program loads `n_tiles` of them at once.

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
    """The parts of a tensor that a kernel's programs process.

    A part has `rows_per_part` rows: a split in a reduction, the tiles of one program in an elementwise pass. There are
    `n_parts` over all groups of rows, and `group_parts` in a full group.
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
    """Return BLOCK_M and BLOCK_C for a tensor of `n_channels` whose images have `n_spatial` = H·W pixels."""
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
    """Return the tiles of a [n_rows, n_channels] tensor.

    `tile_bytes`: a thread's bytes of a tile, over all tensors that are read. `reduction_programs`: the approximate
    number of programs of a reduction; 0 for an elementwise pass.

    No part crosses the end of a group of `rows_per_group` rows. The groups share the programs: with more groups each
    has fewer splits, and the number of partial results is about the same.
    """
    num_warps = REDUCTION_WARPS if reduction_programs and channels_last else NUM_WARPS
    block_m, block_c = choose_blocks(n_channels, n_spatial, channels_last, num_warps)
    n_programs = PASS_PROGRAMS
    if reduction_programs:  # the same number of threads for 4 or 8 warps per program
        n_programs = reduction_programs * REDUCTION_WARPS // num_warps
    n_channel_tiles = triton.cdiv(n_channels, block_c)
    full_groups = (n_rows - 1) // rows_per_group  # without the last group, which may have fewer rows and parts
    last_rows = n_rows - full_groups * rows_per_group
    wanted_parts = max(1, n_programs // (n_channel_tiles * (full_groups + 1)))
    # In NCHW each element has its own 64-bit address, which leaves no registers for more than one tile.
    bytes_ahead = REDUCE_BYTES if reduction_programs else PASS_BYTES
    n_tiles = 1 << max(0, (bytes_ahead // tile_bytes).bit_length() - 1) if channels_last else 1
    if n_tiles > 1 and n_channels % block_c:  # channel masks take registers, too
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
    """Return how many splits are merged per step, and the steps: one if all fit, so that all loads are in flight."""
    block_s = min(COMBINE_BLOCK_S, triton.next_power_of_2(n_splits))
    return {"N_STEPS": triton.cdiv(n_splits, block_s), "BLOCK_S": block_s}


def choose_single_read_tiles(n_rows: int, n_channels: int, n_multiprocessors: int, most_tiles: int) -> Tiles | None:
    """Return tiles with which all programs of a channels_last tensor run at once, one per multiprocessor, or None.

    `most_tiles`: the tiles of each tensor that fit in the registers of one program.
    """
    if n_channels % BITS_PER_BYTE != 0:  # ReLU bits must fill bytes, and loads 16 bytes
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
    """Return the limit of registers per thread on an NVIDIA GPU; `tile` is None for a combine kernel."""
    if tile is None or element_size == 8 or capability >= 100:
        return ALL_REGISTERS
    if tile.num_warps == NUM_WARPS:
        return MAX_REGISTERS
    return MAX_REGISTERS_REDUCTION_16_BITS if element_size == 2 else MAX_REGISTERS_REDUCTION
