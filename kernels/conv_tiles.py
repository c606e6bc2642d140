"""Block sizes of the 3x3 convolutions: the candidates that `resnet-fast tune` measures, each with its reason.

Compiled for sm_90, none of them needs a stack (tests/test_compiled_conv3x3.py). Warp specialization is left out: with
it Triton 3.7 fails to compile for sm_90 (in its pass "nvgpu-warp-specialization").
"""

from typing import NamedTuple

# The kernels support these sizes; cuDNN computes the others. A tile consists of whole lines of such maps. 16 channels
# of a 16-bit type are 32 bytes, the shortest block that a descriptor lays out for the matrix unit. Descriptors count
# rows in 32 bits, and the last part may end after the last row.
WIDTHS = (4, 8, 16, 32)
CHANNEL_MULTIPLE = 16
MAX_ROWS = 2**31 - 2**20

N_MULTIPROCESSORS = 132  # over which the work is divided


class ConvTiles(NamedTuple):
    """Tiles of a convolution: BLOCK_M pixels by BLOCK_N output channels, from BLOCK_K input channels at a time.

    A program computes `per_program` of them, one after the other. `max_registers` is per thread; 0 sets no limit.
    """

    block_m: int
    block_n: int
    block_k: int
    per_program: int
    num_warps: int
    num_stages: int
    max_registers: int


def conv_candidates(in_channels: int, out_channels: int, n_rows: int, with_sums: bool) -> list[ConvTiles]:
    """Return the candidates for a convolution or a data gradient that sums over `in_channels`, at N·H·W = `n_rows`.

    `with_sums`: whether the epilogue computes the sums of a batch norm's backward, whose operands take registers.
    """
    block_k, block_n = block_of(in_channels), block_of(out_channels)
    # Every box of pixels is read nine times from the L2 cache, whose rate bounds the kernels (predicted). Large tiles
    # read it for more channels at once; small ones give more programs if there are few pixels.
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
    """Return the bytes of shared memory that a program uses at most, on a GPU with TMA."""
    # The operands' blocks and two barriers of 8 bytes for every stage, and the block of results.
    operands = tiles.num_stages * (tiles.block_m + tiles.block_n) * tiles.block_k
    return (operands + tiles.block_m * tiles.block_n) * element_size + 16 * tiles.num_stages


def block_of(n_channels: int) -> int:
    """Return the channels of a block: 64 (128 bytes in 16-bit types), or all if fewer, rounded up to a power of two."""
    return min(64, 1 << (n_channels - 1).bit_length())
