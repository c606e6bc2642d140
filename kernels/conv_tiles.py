"""Block sizes of the 3x3 convolutions: the candidates among which `resnet-fast tune` measures, each with its reason.

Compiled for sm_90 none of them needs a stack (tests/test_compiled_conv3x3.py), which decided much: with output channels
as the matrix unit's rows a thread holds few channels of the epilogue's vectors, and fewer registers. Of those for 64
channels and more, 128 by 64 need none for sm_100 either. Left out: warp specialization, at which Triton 3.7 fails for
sm_90 (in its pass "nvgpu-warp-specialization").
"""

from typing import NamedTuple

# What the kernels take; the rest is for cuDNN. A tile is made of whole lines of such maps, and 16 channels of a 16-bit
# type are 32 bytes, the shortest block that a descriptor lays out for the matrix unit. Rows are counted in 32 bits, as
# descriptors count them, and parts may end behind the last.
WIDTHS = (4, 8, 16, 32)
CHANNEL_MULTIPLE = 16
MAX_ROWS = 2**31 - 2**20

# Elements of the weight's gradient to a program that adds its parts up: 16 bytes of each part to a thread of 4 warps.
COMBINE_BLOCK = 512

# Programs that the work is divided among: two or four to each of 132 multiprocessors, which stay and take tile after
# tile, or so many that most have one tile. More of them balance better and write more partial sums, which the combine
# kernel reads with few programs; those of a weight gradient are as large as the weight.
PROGRAMS = (264, 528, 4096)
SPLIT_K_PROGRAMS = PROGRAMS[:2]


class ConvTiles(NamedTuple):
    """How a convolution is cut.

    Of the convolution and its data gradient: BLOCK_M pixels by BLOCK_N output channels, BLOCK_K input channels at a
    time, `per_program` such tiles one after the other. Of the weight gradient: BLOCK_M output channels by BLOCK_N input
    channels of one tap, BLOCK_K pixels at a time, `per_program` such steps to a part of the sum.
    """

    block_m: int
    block_n: int
    block_k: int
    per_program: int
    channels_as_rows: bool  # the matrix unit's rows are output channels (always of the weight gradient), or pixels
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """As the compiler takes them."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def blocks(self) -> dict[str, int]:
        """As the kernels take them."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}


def conv_candidates(in_channels: int, out_channels: int, n_rows: int) -> list[ConvTiles]:
    """Of the convolution from `in_channels` to `out_channels` at `n_rows` = N·H·W pixels, or of a data gradient that
    sums over `in_channels`.
    """
    block_k, block_n = block_of(in_channels), block_of(out_channels)
    if block_n < 64:  # fewer than the rows of sm_90's matrix instruction: pixels are the rows
        shapes = [(128, block_n, False, 4, 3)]
    else:
        # Shared memory feeds the matrix unit: 256 pixels by 64 channels, or 128 by 128, use each byte most often. 64 by
        # 64 leave room for the most programs, and a fourth stage hides more of a load's latency. With pixels as the
        # rows x takes the way through registers, and the epilogue more of them.
        shapes = [(64, 64, True, 4, 3), (128, 64, True, 8, 3), (128, 64, True, 8, 4), (128, 64, False, 8, 3)]
        shapes += [(256, 64, True, 8, 3)]
        if out_channels % 128 == 0:
            shapes.append((128, 128, True, 8, 3))
    found = []
    for block_m, block_n, channels_as_rows, num_warps, num_stages in shapes:
        n_tiles = -(-n_rows // block_m) * -(-out_channels // block_n)
        for per_program in sorted({-(-n_tiles // n_programs) for n_programs in PROGRAMS}):
            found.append(ConvTiles(block_m, block_n, block_k, per_program, channels_as_rows, num_warps, num_stages))
    return found


def weight_gradient_candidates(in_channels: int, out_channels: int, n_rows: int) -> list[ConvTiles]:
    """Of the weight gradient, a sum over `n_rows` = N·H·W pixels, in as many parts as give each of SPLIT_K_PROGRAMS."""
    block_n = block_of(in_channels)
    shapes = [(64, block_n, 64, 4), (64, block_n, 128, 4)]
    if in_channels % 128 == out_channels % 128 == 0:
        shapes += [(128, block_n, 64, 4), (128, 2 * block_n, 64, 8)]
    found = []
    for block_m, block_n, block_k, num_warps in shapes:
        n_tiles = 9 * -(-out_channels // block_m) * -(-in_channels // block_n)
        n_steps = -(-n_rows // block_k)
        for n_programs in SPLIT_K_PROGRAMS:
            n_parts = max(1, n_programs // n_tiles)
            found.append(ConvTiles(block_m, block_n, block_k, -(-n_steps // n_parts), True, num_warps, 3))
    return list(dict.fromkeys(found))


def block_of(n_channels: int) -> int:
    """Channels of a block: 64, a 128-byte line in 16-bit types, or all where there are fewer, as a power of two."""
    return min(64, 1 << (n_channels - 1).bit_length())
