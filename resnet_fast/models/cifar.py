"""The CIFAR-10 networks of He et al. 2015, section 4.2: 6n+2 layers, with or without skip connections.

    conv3x3, w channels - BN+ReLU - n blocks of w, n of 2w, n of 4w channels - average pooling - linear

A block has two convolutions, so 6n+2 layers have weights. The first block of the second and third stages halves height
and width. The paper's networks have w = 16 and n = 3, 5, 7, 9 and 18. A block's skip connection is the identity, except
where the width changes:

    shortcut="A"    every second pixel, and zeros for the new channels: no parameters, as in the paper
    shortcut="B"    a 1x1 convolution and its batch norm
    shortcut=None   no skip connection in any block: the paper's "plain" networks, with as many parameters as A
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, flatten, nn
from torchvision.models.resnet import conv1x1

from ..common.checks import check_integer, is_integer
from ..nn import FusedBatchNorm2d, count_together
from .blocks import BasicBlock, PaddedShortcut, PlainBlock, blocks_to_fuse, run_fused, to_channels_last

Shortcut = Literal["A", "B"] | None
SHORTCUTS = ("A", "B", None)


class CifarResNet(nn.Module):
    """The 6n+2 network of `depth` layers on fused blocks; layouts of input and weights as in `ResNet`.

    Args:
        depth: 6n+2 for n = 1, 2, …: 8, 14, 20, …
        num_classes: number of classes.
        shortcut: "A" (padding), "B" (1x1 convolution) or None (no skip connection).
        width: channels of the first stage; the others have two and four times as many.
        norm_layer: makes a norm from a number of channels; None: FusedBatchNorm2d. Blocks with another are not fused.

    Input [N, 3, H, W] of any size and layout; output [N, num_classes].

    Initial weights of the convolutions and the linear layer are normal with variance 2 / fan_in (He et al. 2015,
    arXiv:1502.01852, equation 10). The linear layer's initial bias is 0.

    Raises:
        ValueError: depth is not 6n+2, the shortcut is unknown, or width or num_classes is not an integer of at least 1.

    He et al. 2015, arXiv:1512.03385, section 4.2.
    """

    bn1: FusedBatchNorm2d

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        *,
        shortcut: Shortcut = "A",
        width: int = 16,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_depth(depth)
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be 'A', 'B' or None, got {shortcut!r}")
        for name, value in (("width", width), ("num_classes", num_classes)):
            check_integer(name, value)
        self.depth, self.shortcut, self.width = depth, shortcut, width
        self._norm_layer = norm_layer or FusedBatchNorm2d
        n_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = self._norm_layer(width)  # type: ignore[assignment]
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_stage(width, width, n_blocks, stride=1)
        self.layer2 = self._make_stage(width, 2 * width, n_blocks, stride=2)
        self.layer3 = self._make_stage(2 * width, 4 * width, n_blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def _make_stage(self, before: int, width: int, n_blocks: int, stride: int) -> nn.Sequential:
        first = self._make_block(before, width, stride)
        return nn.Sequential(first, *(self._make_block(width, width, 1) for _ in range(n_blocks - 1)))

    def _make_block(self, before: int, width: int, stride: int) -> nn.Module:
        if self.shortcut is None:
            return PlainBlock(before, width, stride, self._norm_layer)
        downsample = None
        if before != width and self.shortcut == "A":
            downsample = PaddedShortcut(before, width, stride)
        elif before != width:
            downsample = nn.Sequential(conv1x1(before, width, stride), self._norm_layer(width))
        return BasicBlock(before, width, stride, downsample, norm_layer=self._norm_layer)

    def _blocks_to_fuse(self, x: Tensor) -> list[Any]:
        """Return all blocks in order, or none if the network was changed or is observed."""
        return blocks_to_fuse(self, (self.layer1, self.layer2, self.layer3), x)

    def forward(self, x: Tensor) -> Tensor:
        x = to_channels_last(x)
        blocks = self._blocks_to_fuse(x)
        x = self.conv1(x)
        if not blocks:
            x = self.relu(self.bn1(x))
            x = self.layer3(self.layer2(self.layer1(x)))
        else:
            with count_together():
                x = run_fused(self.bn1, blocks, x)
        x = self.avgpool(x)
        x = flatten(x, 1)
        return self.fc(x)


def check_depth(depth: int) -> None:
    """Raise ValueError, with the nearest depths, unless a network has this depth."""
    if is_integer(depth) and depth >= 8 and depth % 6 == 2:
        return
    if not is_integer(depth):
        raise ValueError(f"depth must be 6n+2 for an integer n of at least 1, such as 20, got {depth!r}")
    below = (depth - 2) // 6 * 6 + 2
    nearest = f"the nearest are {below} and {below + 6}" if below >= 8 else "the smallest is 8"
    raise ValueError(f"depth must be 6n+2 for an integer n of at least 1, got {depth}; {nearest}")


def resnet20(num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Return ResNet-20 for images of about 32x32; `kwargs` are those of `CifarResNet`."""
    return CifarResNet(20, num_classes, **kwargs)


def resnet32(num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Return ResNet-32; arguments as for `resnet20`."""
    return CifarResNet(32, num_classes, **kwargs)


def resnet44(num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Return ResNet-44; arguments as for `resnet20`."""
    return CifarResNet(44, num_classes, **kwargs)


def resnet56(num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Return ResNet-56; arguments as for `resnet20`."""
    return CifarResNet(56, num_classes, **kwargs)


def resnet110(num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Return ResNet-110; arguments as for `resnet20`."""
    return CifarResNet(110, num_classes, **kwargs)


def plain20(num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Return ResNet-20 without its skip connections; `kwargs` are those of `CifarResNet` except `shortcut`."""
    return CifarResNet(20, num_classes, shortcut=None, **kwargs)


def plain32(num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Return ResNet-32 without its skip connections; arguments as for `plain20`."""
    return CifarResNet(32, num_classes, shortcut=None, **kwargs)


def plain44(num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Return ResNet-44 without its skip connections; arguments as for `plain20`."""
    return CifarResNet(44, num_classes, shortcut=None, **kwargs)


def plain56(num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Return ResNet-56 without its skip connections; arguments as for `plain20`."""
    return CifarResNet(56, num_classes, shortcut=None, **kwargs)


def plain110(num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Return ResNet-110 without its skip connections; arguments as for `plain20`."""
    return CifarResNet(110, num_classes, shortcut=None, **kwargs)
