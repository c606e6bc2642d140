"""Block sizes of the 3x3 convolutions: the candidates among which `resnet-fast tune` measures, each with its reason.

Compiled for sm_90 none of them needs a stack (tests/test_compiled_conv3x3.py). Left out: warp specialization, at which
Triton 3.7 fails for sm_90 (in its pass "nvgpu-warp-specialization").
"""

from typing import NamedTuple

# What the kernels take; the rest is for cuDNN. A tile is made of whole lines of such maps, and 16 channels of a 16-bit
# type are 32 bytes, the shortest block that a descriptor lays out for the matrix unit. Rows are counted in 32 bits, as
# descriptors count them, and parts may end behind the last.
WIDTHS = (4, 8, 16, 32)
CHANNEL_MULTIPLE = 16
MAX_ROWS = 2**31 - 2**20

N_MULTIPROCESSORS = 132  # among which the work is divided


class ConvTiles(NamedTuple):
    """How a convolution is cut: BLOCK_M pixels by BLOCK_N output channels, BLOCK_K input channels at a time, and
    `per_program` such tiles one after the other. `max_registers`: of a thread; 0: what the compiler takes.
    """

    block_m: int
    block_n: int
    block_k: int
    per_program: int
    num_warps: int
    num_stages: int
    max_registers: int


def conv_candidates(in_channels: int, out_channels: int, n_rows: int, with_sums: bool) -> list[ConvTiles]:
    """Of the convolution from `in_channels` to `out_channels` at `n_rows` = N·H·W pixels, or of a data gradient, which
    sums over `in_channels`: `with_sums` of a batch norm's backward, whose operands take registers.
    """
    block_k, block_n = block_of(in_channels), block_of(out_channels)
    # Every pixel box is read nine times from the L2 cache, whose rate bounds the kernels (predicted): large tiles read
    # it for more channels at once, small ones leave more programs where there are few pixels.
    shapes = [(128, block_n, 8 if block_n == 64 else 4, 3, 0, 2)]
    shapes.append((256, block_n, 8, 2, 0, 1) if with_sums else (256, block_n, 8, 2, 128, 2))
    if out_channels % 128 == 0:
        shapes.append((128 if with_sums else 256, 128, 8, 3, 0, 1))
    found = []
    for block_m, block_n, num_warps, num_stages, max_registers, resident in shapes:
        n_tiles = -(-n_rows // block_m) * -(-out_channels // block_n)
        per_program = -(-n_tiles // (resident * N_MULTIPROCESSORS))
        found.append(ConvTiles(block_m, block_n, block_k, per_program, num_warps, num_stages, max_registers))
    return found


def shared_bytes(tiles: ConvTiles, element_size: int) -> int:
    """Shared memory that a program takes at most, compiled for a GPU with TMA: the operands' blocks of every stage, the
    block of results, and two barriers of 8 bytes a stage.
    """
    operands = tiles.num_stages * (tiles.block_m + tiles.block_n) * tiles.block_k
    return (operands + tiles.block_m * tiles.block_n) * element_size + 16 * tiles.num_stages


def block_of(n_channels: int) -> int:
    """Channels of a block: 64, a 128-byte line in 16-bit types, or all where there are fewer, as a power of two."""
    return min(64, 1 << (n_channels - 1).bit_length())
