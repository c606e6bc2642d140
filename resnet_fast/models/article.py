"""The residual block and the network of an introduction to skip connections, on the fused batch norm.

Unlike torchvision's, a block uses one batch norm in two places and has biases in its convolutions. Its last ReLU
follows not the addition but the convolution after it:

    h = relu(bn(conv1(x)))                      conv1, conv2 3x3, with as many channels as x
    h = bn(conv2(h)) + shortcut(x)              the same bn; the shortcut is x, or conv3(x), 1x1
    y = relu(conv4(h))                          1x1 with the stride, to the width of the output

docs/article.md lists what the article's code leaves open, and our reading of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..common.checks import check_integer
from ..nn import FusedBatchNorm2d, count_together
from .blocks import is_fused, is_observed, to_channels_last

STEM_CHANNELS = 64
# Channels in and out, and whether the shortcut is the identity; each block halves the map.
BLOCKS = (
    (64, 64, True),
    (64, 64, True),
    (64, 128, False),
    (128, 128, True),
    (128, 256, False),
    (256, 256, True),
    (256, 512, False),
    (512, 512, True),
)


class ResidualBlock(nn.Module):
    """conv3x3 - BN+ReLU - conv3x3 - BN+add - conv1x1 - ReLU, where both BN are one module.

    A training forward updates its running statistics and its batch counter twice: with the output of conv1, then with
    that of conv2.

    Args:
        num_channels: channels of the input and of everything before conv4.
        output_channels: channels of the output. Either shortcut allows any number, because conv4 follows the addition.
        is_identity: whether the shortcut is the input itself. If not, it is conv3, 1x1, which keeps the width.
        stride: stride of conv4.
        norm_layer: makes a norm from a number of channels; None: FusedBatchNorm2d. With another the block is not fused.

    Input [N, num_channels, H, W] in any layout; output [N, output_channels, ceil(H / stride), ceil(W / stride)].

    Raises:
        ValueError: num_channels, output_channels or stride is not an integer of at least 1.

    He et al. 2015, arXiv:1512.03385, for the two shortcuts.
    """

    conv3: nn.Conv2d | None

    def __init__(
        self,
        num_channels: int,
        output_channels: int,
        is_identity: bool = True,
        stride: int = 1,
        *,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        sizes = {"num_channels": num_channels, "output_channels": output_channels, "stride": stride}
        for name, value in sizes.items():
            check_integer(name, value)
        super().__init__()
        self.num_channels, self.output_channels = num_channels, output_channels
        self.conv1 = nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1)
        self.batch_norm: Any = (norm_layer or FusedBatchNorm2d)(num_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1)
        self.conv3 = None if is_identity else nn.Conv2d(num_channels, num_channels, kernel_size=1)
        self.conv4 = nn.Conv2d(num_channels, output_channels, kernel_size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        if not _can_fuse(self, x):
            return self._plain_forward(x)
        out = self.conv1(x)
        out = self.batch_norm.fused(out, relu=True)
        out = self.conv2(out)
        out = self.batch_norm.fused(out, self._shortcut(x), relu=False)
        out = self.conv4(out)
        return self.relu(out)

    def _plain_forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.batch_norm(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.batch_norm(out)
        out = out + self._shortcut(x)
        out = self.conv4(out)
        return self.relu(out)

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.conv3 is None else self.conv3(x)


class ResNetModel(nn.Module):
    """conv7x7 stride 2 - BN+ReLU - max-pool stride 2 - blocks - linear; layouts as in `resnet.ResNet`.

    Args:
        residual_blocks: a sequence of ResidualBlocks. The first has 64 input channels; every other one has as
            many as the previous one outputs.
        nb_classes: number of classes.
        norm_layer: makes the stem's norm, as in `ResidualBlock`.

    Input [N, 3, H, W] in any layout; output [N, nb_classes]. The article's blocks reduce 32x32 images to a 1x1 map. A
    larger map is averaged over its pixels before the linear layer.

    Raises:
        TypeError: a block is not a ResidualBlock.
        ValueError: there is no block, a block's num_channels is not the number of channels before it, or nb_classes is
            not an integer of at least 1.
    """

    def __init__(
        self,
        residual_blocks: Sequence[ResidualBlock],
        nb_classes: int,
        *,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        check_integer("nb_classes", nb_classes)
        if not residual_blocks:
            raise ValueError("residual_blocks must hold at least one block, got none")
        width, before = STEM_CHANNELS, "the stem"
        for i, block in enumerate(residual_blocks):
            if not isinstance(block, ResidualBlock):
                raise TypeError(f"residual_blocks[{i}] must be a ResidualBlock, got {type(block).__name__}")
            if block.num_channels != width:
                rule = f"must be {width}, the output channels of {before}"
                raise ValueError(f"residual_blocks[{i}].num_channels {rule}, got {block.num_channels}")
            width, before = block.output_channels, f"residual_blocks[{i}]"
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, kernel_size=7, stride=2, padding=1)
        self.batch_norm: Any = (norm_layer or FusedBatchNorm2d)(STEM_CHANNELS)
        self.relu = nn.ReLU()
        self.max_pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.residual_blocks = nn.Sequential(*residual_blocks)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(width, nb_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = to_channels_last(x)
        x = self.conv1(x)
        if _can_fuse(self, x):
            with count_together():
                x = self.max_pool(self.batch_norm.fused(x, relu=True))
                x = self.residual_blocks(x)
        else:
            x = self.max_pool(self.relu(self.batch_norm(x)))
            x = self.residual_blocks(x)
        x = F.adaptive_avg_pool2d(x, 1)  # not a module, because the article's table has no row for it
        x = self.flatten(x)
        return self.linear(x)


def _can_fuse(module: Any, x: Tensor) -> bool:
    """Return whether norm and ReLU are unchanged and nothing observes the steps inside."""
    return is_fused(module.batch_norm) and type(module.relu) is nn.ReLU and not is_observed(module, x)


def article(num_classes: int = 10, norm_layer: Callable[..., nn.Module] | None = None) -> ResNetModel:
    """Return the network that the article trains on CIFAR-10: eight blocks of stride 2, 8,522,186 parameters.

    Args:
        num_classes: number of classes.
        norm_layer: makes a norm from a number of channels; None: FusedBatchNorm2d. Blocks with another are not fused.

    Input [N, 3, H, W] in any layout; output [N, num_classes].

    Raises:
        ValueError: num_classes is not an integer of at least 1.
    """
    blocks = [ResidualBlock(*sizes, stride=2, norm_layer=norm_layer) for sizes in BLOCKS]
    return ResNetModel(blocks, num_classes, norm_layer=norm_layer)
