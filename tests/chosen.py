"""Tables of choices for tests, a network that uses them, and a record of the kernels that are launched."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from resnet_fast import FusedBatchNorm2d
from resnet_fast.kernels.conv_tiles import ConvTiles
from resnet_fast.models.blocks import BasicBlock, blocks_to_fuse, run_fused
from resnet_fast.ops import launch
from resnet_fast.ops.implementations import CONV3X3, Choice, Problem

CONVOLUTIONS = ("convolution", "data gradient")
TILES = ConvTiles(block_m=64, block_n=16, block_k=16, per_program=2, num_warps=4, num_stages=3, max_registers=0)


class Fused(Mapping):
    """Has conv3x3 for every problem of these operations; `asked` are the problems that had it."""

    def __init__(self, operations: Iterable[str] = CONVOLUTIONS) -> None:
        self.operations, self.asked = set(operations), []

    def __len__(self) -> int:
        return len(self.operations)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.asked)

    def __getitem__(self, problem: Problem) -> Choice:
        if problem.operation not in self.operations:
            raise KeyError(problem)
        self.asked.append(problem)
        return Choice(CONV3X3, TILES)


class ThreeBlocks(nn.Module):
    """A stem's batch norm, then an identity block, one with a projection, and another: 16 and 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        projection = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), FusedBatchNorm2d(32))
        self.bn1, self.relu = FusedBatchNorm2d(16), nn.ReLU()
        self.layer = nn.Sequential(
            BasicBlock(16, 16, norm_layer=FusedBatchNorm2d),
            BasicBlock(16, 32, 2, projection, norm_layer=FusedBatchNorm2d),
            BasicBlock(32, 32, norm_layer=FusedBatchNorm2d),
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, 16, H, W]; returns [N, 32, H/2, W/2]."""
        blocks = blocks_to_fuse(self, (self.layer,), x)
        if not blocks:
            return self.layer(self.relu(self.bn1(x)))
        return run_fused(self.bn1, blocks, x)


@contextmanager
def launched() -> Iterator[list[str]]:
    """The names of the kernels that are launched inside the context."""
    kernels: list[str] = []
    run = launch.launch_kernel

    def noted(kernel, *settings, **arguments):
        kernels.append(kernel.__name__)
        run(kernel, *settings, **arguments)

    with mock.patch.object(launch, "launch_kernel", noted):
        yield kernels
