"""torchvision's ResNet-18 … 152 with every batch norm, addition and ReLU of a block fused.

The classes are torchvision's own, so constructors, initialization, checkpoint keys and module names are theirs. What
differs is the forward pass: a block runs the fused operation over its submodules. Whatever might look at, or has been
put in place of, one of the steps in between (hooks, torch.fx, other layers, patched forwards) makes the block run
torchvision's forward, step by step: the same numbers, without the fusion. What is around the whole sees no step.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, channels_last, flatten, fx, nn
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

from ..nn import FusedBatchNorm2d, FusedSyncBatchNorm2d
from .pretrained import check_fit, verify

Stem = Literal["imagenet", "cifar"]


def is_observed(module: nn.Module, x: Tensor) -> bool:
    """Whether somebody looks at, or has patched, what goes on inside `module`: hooks, torch.fx, a patched forward.

    Those of `module` itself do not count: they see its input and output, which are the same fused or not. Accelerate
    puts autocast around a network's forward in this way.
    """
    if isinstance(x, fx.Proxy) or nn.modules.module._has_any_global_hook():
        return True
    return any(has_own_hook(m) for m in module.modules() if m is not module)


def has_own_hook(module: nn.Module) -> bool:
    """Whether there are hooks at this module, or a patched forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _is_fused(norm: nn.Module) -> bool:
    return type(norm) in (FusedBatchNorm2d, FusedSyncBatchNorm2d) and not norm.relu


def _is_projection(downsample: nn.Module, norm: Any) -> bool:
    """torchvision's projection shortcut, a convolution and its batch norm, of the statistics of as many as `norm`."""
    if type(downsample) is not nn.Sequential or len(downsample) != 2:
        return False
    own: Any = downsample[1]
    return _is_fused(own) and own.group() is norm.group() and own.ghost_batch_size == norm.ghost_batch_size


def give_cifar_stem(model: torchvision_resnet.ResNet) -> None:
    """Put a 3x3 convolution of stride 1 in place of the stem's, initialized as torchvision's, and no pooling."""
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()  # type: ignore[assignment]


class _FusedBlock(nn.Module):
    """What both blocks share: when to fuse."""

    conv1: nn.Module
    bn1: FusedBatchNorm2d
    conv2: nn.Module
    bn2: FusedBatchNorm2d
    relu: nn.Module
    downsample: nn.Module | None

    def can_fuse(self) -> bool:
        """Whether the block is as it was built. Hooks are looked for separately, once for a whole network."""
        norms = [module for name, module in self.named_children() if name.startswith("bn")]
        return (
            type(self) in (BasicBlock, Bottleneck)
            and type(self.relu) is nn.ReLU
            and all(map(_is_fused, norms))
            and (self.downsample is None or _is_projection(self.downsample, norms[-1]))
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_fuse() or is_observed(self, x):
            return super().forward(x)
        return self.fused_forward(x, x)

    def fused_forward(self, x: Tensor, shortcut: Tensor, fork: bool = False) -> Any:
        """`x` and `shortcut` are the block's input, once for each consumer; returns y, or two handles to it."""
        raise NotImplementedError


class BasicBlock(_FusedBlock, torchvision_resnet.BasicBlock):
    """conv3x3 - BN+ReLU - conv3x3 - BN+add+ReLU; the batch norm of a projection shortcut joins the last."""

    def fused_forward(self, x: Tensor, shortcut: Tensor, fork: bool = False) -> Any:
        out = self.conv1(x)
        out = self.bn1.fused(out, relu=True)
        out = self.conv2(out)
        return _join(self.bn2, out, self.downsample, shortcut, fork)


class Bottleneck(_FusedBlock, torchvision_resnet.Bottleneck):
    """conv1x1 - BN+ReLU - conv3x3 - BN+ReLU - conv1x1 - BN+add+ReLU, with the stride in the 3x3 convolution."""

    conv3: nn.Module
    bn3: FusedBatchNorm2d

    def fused_forward(self, x: Tensor, shortcut: Tensor, fork: bool = False) -> Any:
        out = self.conv1(x)
        out = self.bn1.fused(out, relu=True)
        out = self.conv2(out)
        out = self.bn2.fused(out, relu=True)
        out = self.conv3(out)
        return _join(self.bn3, out, self.downsample, shortcut, fork)


def _join(norm: FusedBatchNorm2d, out: Tensor, downsample: Any, shortcut: Tensor, fork: bool) -> Any:
    """relu(bn(out) + shortcut), the shortcut as it is or through its convolution and its own batch norm."""
    residual_norm = None
    if downsample is not None:
        conv, residual_norm = downsample
        shortcut = conv(shortcut)
    return norm.fused(out, shortcut, residual_norm, relu=True, fork=fork)


class ResNet(torchvision_resnet.ResNet):
    """torchvision's ResNet on fused blocks, its convolution weights in channels_last.

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks per stage.
        stem: "imagenet" (7x7 stride 2, max-pool) or "cifar" (3x3 stride 1, no pooling: for images of about 32x32).
        num_classes, zero_init_residual, groups, width_per_group, replace_stride_with_dilation: as torchvision's.
        norm_layer: makes a norm from a number of channels; None: FusedBatchNorm2d. Blocks with another are not fused.

    Input [N, 3, H, W] in any layout; output [N, num_classes].

    Raises:
        ValueError: unknown stem.

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
            num_classes,
            zero_init_residual,
            groups,
            width_per_group,
            replace_stride_with_dilation,
            norm_layer or FusedBatchNorm2d,
        )
        if stem == "cifar":
            give_cifar_stem(self)
        self.to(memory_format=channels_last)  # type: ignore[call-overload]

    def _blocks_to_fuse(self, x: Tensor) -> list[Any]:
        """All blocks in order, or none where the network is not as it was built."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        if not _is_fused(self.bn1) or type(self.relu) is not nn.ReLU or is_observed(self, x):
            return []
        if any(type(stage) is not nn.Sequential for stage in stages):
            return []
        blocks = [block for stage in stages for block in stage]
        return blocks if all(isinstance(block, _FusedBlock) and block.can_fuse() for block in blocks) else []

    def _forward_impl(self, x: Tensor) -> Tensor:
        blocks = self._blocks_to_fuse(x)
        if not blocks:
            return super()._forward_impl(x)

        # Every block's input has two consumers, its first convolution and its shortcut: each gets a handle of its own,
        # so that the backward of the operation that made it adds the two gradients in registers.
        x = self.conv1(x)
        if type(self.maxpool) is nn.Identity:
            x, shortcut = self.bn1.fused(x, relu=True, fork=True)
        else:
            x = shortcut = self.maxpool(self.bn1.fused(x, relu=True))
        for block in blocks[:-1]:
            x, shortcut = block.fused_forward(x, shortcut, fork=True)
        x = blocks[-1].fused_forward(x, shortcut)

        x = self.avgpool(x)
        x = flatten(x, 1)
        return self.fc(x)


def _resnet(
    block: type[BasicBlock | Bottleneck],
    layers: list[int],
    known: type[WeightsEnum],
    weights: Any,
    progress: bool,
    **kwargs: Any,
) -> ResNet:
    weights = verify(known, weights)
    if weights is not None:
        check_fit(weights, 512 * block.expansion, kwargs)
    model = ResNet(block, layers, **kwargs)
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


@handle_legacy_interface(weights=("pretrained", ResNet18_Weights.IMAGENET1K_V1))
def resnet18(*, weights: ResNet18_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18: torchvision's function, on fused blocks.

    Args:
        weights: torchvision's pretrained weights, as a member of its enumeration or by name, "IMAGENET1K_V1" or
            "DEFAULT", for its 1,000 classes and the stem "imagenet"; or None.
        progress: show the download's progress.
        kwargs: those of `ResNet`, among them `num_classes` and `stem`.

    Raises:
        ValueError: no weights of that name, or `stem` or `num_classes` are not those of the weights.
        TypeError: the weights are of another network.
    """
    return _resnet(BasicBlock, [2, 2, 2, 2], ResNet18_Weights, weights, progress, **kwargs)


@handle_legacy_interface(weights=("pretrained", ResNet34_Weights.IMAGENET1K_V1))
def resnet34(*, weights: ResNet34_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34; arguments as for `resnet18`."""
    return _resnet(BasicBlock, [3, 4, 6, 3], ResNet34_Weights, weights, progress, **kwargs)


@handle_legacy_interface(weights=("pretrained", ResNet50_Weights.IMAGENET1K_V1))
def resnet50(*, weights: ResNet50_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50; arguments as for `resnet18`."""
    return _resnet(Bottleneck, [3, 4, 6, 3], ResNet50_Weights, weights, progress, **kwargs)


@handle_legacy_interface(weights=("pretrained", ResNet101_Weights.IMAGENET1K_V1))
def resnet101(*, weights: ResNet101_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101; arguments as for `resnet18`."""
    return _resnet(Bottleneck, [3, 4, 23, 3], ResNet101_Weights, weights, progress, **kwargs)


@handle_legacy_interface(weights=("pretrained", ResNet152_Weights.IMAGENET1K_V1))
def resnet152(*, weights: ResNet152_Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152; arguments as for `resnet18`."""
    return _resnet(Bottleneck, [3, 8, 36, 3], ResNet152_Weights, weights, progress, **kwargs)
