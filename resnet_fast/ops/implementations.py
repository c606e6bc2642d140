"""The operations that have several implementations, these implementations, and their block sizes."""

from typing import Literal, NamedTuple

import torch

from resnet_fast.kernels.conv_tiles import ConvTiles, conv_candidates

Operation = Literal["convolution", "data gradient", "batch norm", "batch norm backward"]
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # other types always use the default


class Problem(NamedTuple):
    """An operation with its type and shape. Convolutions are 3x3, stride 1, padding 1; maps square and channels_last.

    `join` and `fork` belong to the batch norm; for a data gradient, to the batch norm whose sums it computes.
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
    """An implementation by its name in `IMPLEMENTATIONS`; only conv3x3 has `tiles`."""

    implementation: str
    tiles: ConvTiles | None = None


CUDNN, CONV3X3 = "cudnn", "conv3x3"
TWO_PASSES, REVERSED, SINGLE_READ = "two passes", "two passes, reversed", "single read"
# The implementations of each operation; the first is the default. Operations are tuned in this order, because conv3x3
# is compared with cuDNN and the chosen batch norm.
IMPLEMENTATIONS: dict[Operation, tuple[str, ...]] = {
    "batch norm": (TWO_PASSES, REVERSED, SINGLE_READ),
    "batch norm backward": (TWO_PASSES, REVERSED, SINGLE_READ),
    "convolution": (CUDNN, CONV3X3),
    "data gradient": (CUDNN, CONV3X3),
}
DEFAULTS: dict[Operation, Choice] = {operation: Choice(names[0]) for operation, names in IMPLEMENTATIONS.items()}


def tiles_of(problem: Problem) -> list[ConvTiles]:
    """Return the candidate block sizes of conv3x3 for a problem."""
    n_in, n_out, n_rows = problem.in_channels, problem.out_channels, problem.n_images * problem.width**2
    if problem.operation == "data gradient":
        return conv_candidates(n_out, n_in, n_rows, with_sums=True)
    return conv_candidates(n_in, n_out, n_rows, with_sums=False)
