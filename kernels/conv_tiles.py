"""Block sizes of the 3x3 convolutions, and the candidates among which `resnet-fast tune` measures."""

from typing import NamedTuple

# Maps whose lines a tile is made of; wider ones are for cuDNN.
WIDTHS = (4, 8, 16, 32)

# Elements of the weight's gradient to a program that adds its parts up: 16 bytes of each part to a thread of 4 warps.
COMBINE_BLOCK = 512


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
    channels_as_rows: bool  # operand order: the matrix unit's rows are output channels, or pixels
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """As the compiler takes them."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}
