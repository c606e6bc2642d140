"""What there is to choose among: operations, their implementations, and the block sizes of these."""

from typing import Literal, NamedTuple

import torch

from resnet_fast.kernels.conv_tiles import ConvTiles, conv_candidates

Operation = Literal["convolution", "data gradient", "batch norm", "batch norm backward"]
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # others have no choice


class Problem(NamedTuple):
    """What is chosen for. Convolutions are 3x3, stride 1, padding 1; maps are square; the layout is channels_last.

    `join` and `fork` are those of a batch norm; of a data gradient, those of the batch norm whose sums it computes.
    """

    operation: Operation
    dtype: str
    n_images: int
    in_channels: int
    out_channels: int
    width: int
    join: str = "none"
    fork: bool = False


class Choice(NamedTuple):
    """An implementation by its name, below; `tiles` are those of conv3x3."""

    implementation: str
    tiles: ConvTiles | None = None


CUDNN, CONV3X3 = "cudnn", "conv3x3"
TWO_PASSES, REVERSED, SINGLE_READ = "two passes", "two passes, reversed", "single read"
# By operation, in the order in which they are tuned: conv3x3 is compared with cuDNN and the batch norm that was chosen.
# The default is the first.
IMPLEMENTATIONS: dict[Operation, tuple[str, ...]] = {
    "batch norm": (TWO_PASSES, REVERSED, SINGLE_READ),
    "batch norm backward": (TWO_PASSES, REVERSED, SINGLE_READ),
    "convolution": (CUDNN, CONV3X3),
    "data gradient": (CUDNN, CONV3X3),
}
DEFAULTS: dict[Operation, Choice] = {operation: Choice(names[0]) for operation, names in IMPLEMENTATIONS.items()}


def tiles_of(problem: Problem) -> list[ConvTiles]:
    """The block sizes of conv3x3 that there are for a problem."""
    n_in, n_out, n_rows = problem.in_channels, problem.out_channels, problem.n_images * problem.width**2
    if problem.operation == "data gradient":
        return conv_candidates(n_out, n_in, n_rows, with_sums=True)
    return conv_candidates(n_in, n_out, n_rows, with_sums=False)
