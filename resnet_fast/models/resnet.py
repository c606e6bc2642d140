"""torchvision's ResNet-18 … 152 with every batch norm, addition and ReLU of a block fused.

The classes subclass torchvision's, so constructors, initialization, checkpoint keys and module names are the same. Only
the forward pass differs: it runs fused blocks and gives each consumer of an output a handle. blocks.py says when.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, flatten, nn
from torchvision.models import (
    ResNet18_Weights,
    ResNet34_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    ResNet152_Weights,
)
from torchvision.models import resnet as torchvision_resnet
from torchvision.models._api import WeightsEnum
from torchvision.models._utils import handle_legacy_interface

from ..common.checks import check_integer
from ..nn import FusedBatchNorm2d, count_together
from .blocks import BasicBlock, Bottleneck, blocks_to_fuse, run_blocks, run_fused, to_channels_last
from .pretrained import check_fit, verify

Stem = Literal["imagenet", "cifar"]


def give_cifar_stem(model: torchvision_resnet.ResNet) -> None:
    """Replace the stem with a 3x3 convolution of stride 1, initialized as torchvision's, without pooling."""
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()  # type: ignore[assignment]


class ResNet(torchvision_resnet.ResNet):
    """torchvision's ResNet on fused blocks. It computes in channels_last, whatever the layout of input and weights.

    Weights start in torch's default layout, which every tool supports. `model.to(memory_format=torch.channels_last)`
    saves a copy of every convolution weight and of its gradient in each step.

    Args:
        block: BasicBlock or Bottleneck.
        layers: number of blocks per stage.
        stem: "imagenet" (7x7 stride 2, max-pool) or "cifar" (3x3 stride 1, no pooling: for images of about 32x32).
        num_classes, zero_init_residual, groups, width_per_group, replace_stride_with_dilation: as in torchvision.
        norm_layer: makes a norm from a number of channels; None: FusedBatchNorm2d. Blocks with another are not fused.

    Input [N, 3, H, W] in any layout; output [N, num_classes].

    Raises:
        ValueError: the stem is unknown, or num_classes is not an integer of at least 0.

    He et al. 2015, arXiv:1512.03385, table 1; section 4.2 for the CIFAR stem.
    """

    bn1: FusedBatchNorm2d
    maxpool: nn.Module

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        stem: Stem = "imagenet",
    ) -> None:
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
        super().__init__(
            block,
            layers,
            check_integer("num_classes", num_classes, 0),
            zero_init_residual,
            groups,
            width_per_group,
            replace_stride_with_dilation,
            norm_layer or FusedBatchNorm2d,
        )
        if stem == "cifar":
            give_cifar_stem(self)

    def _blocks_to_fuse(self, x: Tensor) -> list[Any]:
        """Return all blocks in order, or none if the network was changed or is observed."""
        return blocks_to_fuse(self, (self.layer1, self.layer2, self.layer3, self.layer4), x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = to_channels_last(x)
        blocks = self._blocks_to_fuse(x)
        if not blocks:
            return super()._forward_impl(x)
        x = self.conv1(x)
        with count_together():
            if type(self.maxpool) is nn.Identity:
                x = run_fused(self.bn1, blocks, x)
            else:
                x = self.maxpool(self.bn1.fused(x, relu=True))
                x = run_blocks(blocks, x, x)
        x = self.avgpool(x)
        x = flatten(x, 1)
        return self.fc(x)


def _resnet(
    block: type[BasicBlock | Bottleneck],
    layers: list[int],
    weights_enum: type[WeightsEnum],
    weights: Any,
    progress: bool,
    **kwargs: Any,
) -> ResNet:
    weights = verify(weights_enum, weights)
    if weights is not None:
        check_fit(weights, 512 * block.expansion, kwargs)
    model = ResNet(block, layers, **kwargs)
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


@handle_legacy_interface(weights=("pretrained", ResNet18_Weights.IMAGENET1K_V1))
def resnet18(*, weights: ResNet18_Weights | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return ResNet-18 on fused blocks, with the arguments of torchvision's function.

    Args:
        weights: torchvision's pretrained weights, as a member of its enumeration or by name ("IMAGENET1K_V1" or
            "DEFAULT"), or None. They need 1,000 classes and the stem "imagenet".
        progress: whether to show the download's progress.
        kwargs: arguments of `ResNet`, such as `num_classes` and `stem`.

    Raises:
        ValueError: no weights have that name, or `stem` or `num_classes` does not fit them.
        TypeError: the weights belong to another network.
    """
    return _resnet(BasicBlock, [2, 2, 2, 2], ResNet18_Weights, weights, progress, **kwargs)


@handle_legacy_interface(weights=("pretrained", ResNet34_Weights.IMAGENET1K_V1))
def resnet34(*, weights: ResNet34_Weights | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return ResNet-34; arguments as for `resnet18`."""
    return _resnet(BasicBlock, [3, 4, 6, 3], ResNet34_Weights, weights, progress, **kwargs)


@handle_legacy_interface(weights=("pretrained", ResNet50_Weights.IMAGENET1K_V1))
def resnet50(*, weights: ResNet50_Weights | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return ResNet-50; arguments as for `resnet18`."""
    return _resnet(Bottleneck, [3, 4, 6, 3], ResNet50_Weights, weights, progress, **kwargs)


@handle_legacy_interface(weights=("pretrained", ResNet101_Weights.IMAGENET1K_V1))
def resnet101(*, weights: ResNet101_Weights | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return ResNet-101; arguments as for `resnet18`."""
    return _resnet(Bottleneck, [3, 4, 23, 3], ResNet101_Weights, weights, progress, **kwargs)


@handle_legacy_interface(weights=("pretrained", ResNet152_Weights.IMAGENET1K_V1))
def resnet152(*, weights: ResNet152_Weights | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Return ResNet-152; arguments as for `resnet18`."""
    return _resnet(Bottleneck, [3, 8, 36, 3], ResNet152_Weights, weights, progress, **kwargs)
