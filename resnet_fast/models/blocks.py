"""The fused blocks that all models share, and the conditions under which a block or a network is fused.

BasicBlock and Bottleneck subclass torchvision's, so constructors, initialization, checkpoint keys and module names are
the same. Only the forward pass differs: a block runs the fused operation over its submodules. If a step inside may be
observed or has been replaced (hooks, torch.fx, other layers, patched forwards), the block runs torchvision's forward
step by step, with the same results. Hooks and patches of the whole module do not matter, because they see no step.
"""

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models import resnet as torchvision_resnet

from ..nn import FusedBatchNorm2d, FusedSyncBatchNorm2d
from ..pairs import can_pair, pair

HOOKS = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def to_channels_last(x: Any) -> Any:
    """Return a network's input in channels_last; each layer then computes in it, whatever the layout of its weights.

    Anything except a 4-D strided tensor is returned unchanged, so that the first layer raises its own error. So is a
    tensor under torch.func, whose transforms do not support layouts and run ATen.
    """
    if isinstance(x, fx.Proxy):  # one step, so that a traced network computes the same bits
        return x.tracer.create_proxy("call_function", to_channels_last, (x,), {})
    if not isinstance(x, Tensor) or x.dim() != 4 or x.layout != torch.strided:
        return x
    if torch._C._are_functorch_transforms_active():
        return x
    # Not `contiguous`, which accepts the strides of a single channel as channels_last; convolutions do not.
    return x.to(memory_format=torch.channels_last)


def is_observed(module: nn.Module, x: Tensor) -> bool:
    """Return whether hooks, torch.fx or a patched forward may observe or change the steps inside `module`.

    Hooks and patches of `module` itself do not count: they see only its input and output, which are the same fused or
    not. Accelerate puts autocast around a network's forward in this way.
    """
    if isinstance(x, fx.Proxy) or nn.modules.module._has_any_global_hook():
        return True
    return any(has_own_hook(m) for m in module.modules() if m is not module)


class Structure:
    """A record of a network's modules, their classes, and the settings of its norms.

    It holds no reference to the network itself, so that its entry in `_structures` vanishes with the network.
    """

    def __init__(self, network: nn.Module) -> None:
        modules = [module for module in network.modules() if module is not network]
        self.own = [*map(vars, modules)]
        self.parents = [module for module in modules if module._modules]
        self.norms = [module for module in modules if isinstance(module, FusedBatchNorm2d)]
        self.made_of = self._made_of(network)

    def _made_of(self, network: nn.Module) -> list[Any]:
        """Return all children, their classes, and the settings of norms that `is_fused` and `is_projection` read."""
        children = [*network._modules.values()]
        for module in self.parents:
            children += module._modules.values()
        settings = [(norm.relu, norm.ghost_batch_size) for norm in self.norms]
        groups = [norm.group() for norm in self.norms if type(norm) is not FusedBatchNorm2d]
        return [*children, *map(type, children), *settings, *groups]

    def is_current(self, network: nn.Module) -> bool:
        """Return whether modules and settings are still the same, and no module has hooks or a patched forward."""
        hooks = itertools.chain.from_iterable(map(HOOKS, self.own))
        has_hook = any(hooks) or any(map(operator.contains, self.own, itertools.repeat("forward")))
        return not has_hook and self._made_of(network) == self.made_of


_structures: WeakKeyDictionary[nn.Module, tuple[Structure, list[Any]]] = WeakKeyDictionary()


def has_own_hook(module: nn.Module) -> bool:
    """Return whether this module itself has hooks or a patched forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_fused(norm: nn.Module) -> bool:
    return type(norm) in (FusedBatchNorm2d, FusedSyncBatchNorm2d) and not norm.relu


def is_projection(downsample: nn.Module, norm: Any) -> bool:
    """Return whether `downsample` is torchvision's projection shortcut: a convolution and a fused batch norm.

    The batch norm must take statistics over the same processes and ghost batches as `norm`.
    """
    if type(downsample) is not nn.Sequential or len(downsample) != 2:
        return False
    own: Any = downsample[1]
    return is_fused(own) and own.group() is norm.group() and own.ghost_batch_size == norm.ghost_batch_size


class PaddedShortcut(nn.Module):
    """Shortcut option A of He et al. for a change of width: every `stride`-th pixel, then channels of zeros.

    Args:
        in_channels, out_channels: channels of input and output; the difference is filled with zeros.
        stride: stride of the block's first convolution, so that output sizes agree for images of any size.

    Raises:
        ValueError: out_channels is below in_channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"out_channels must be at least in_channels, got {out_channels} for {in_channels}")
        self.n_zeros, self.stride = out_channels - in_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, out_channels, ceil(H / stride), ceil(W / stride)] from x: [N, in_channels, H, W]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.n_zeros))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, n_zeros={self.n_zeros}"


class FusedBlock(nn.Module):
    """Base of the blocks, which decides whether to fuse."""

    conv1: nn.Module
    bn1: FusedBatchNorm2d
    conv2: nn.Module
    bn2: FusedBatchNorm2d
    relu: nn.Module
    downsample: nn.Module | None

    def can_fuse(self) -> bool:
        """Return whether norms, ReLU and shortcut are unchanged. Hooks are checked once for a whole network."""
        norms = [module for name, module in self.named_children() if name.startswith("bn")]
        return (
            type(self) in (BasicBlock, Bottleneck, PlainBlock)
            and type(self.relu) is nn.ReLU
            and all(map(is_fused, norms))
            and (
                self.downsample is None
                or type(self.downsample) is PaddedShortcut
                or is_projection(self.downsample, norms[-1])
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_fuse() or is_observed(self, x):
            return self.steps(x)
        return self.fused_forward(x, x)

    def steps(self, x: Tensor) -> Tensor:
        """Run torchvision's forward, without fusion."""
        return super().forward(x)  # type: ignore[misc]

    def fused_forward(self, x: Tensor, shortcut: Tensor | None, fork: bool = False) -> Any:
        """Return y, or with `fork` a handle of y for each of two consumers.

        `x` and `shortcut` are the block's input, as handles for its first convolution and its shortcut.
        """
        raise NotImplementedError


class BasicBlock(FusedBlock, torchvision_resnet.BasicBlock):
    """conv3x3 - BN+ReLU - conv3x3 - BN+add+ReLU; the batch norm of a projection shortcut joins the last."""

    def fused_forward(self, x: Tensor, shortcut: Tensor | None, fork: bool = False) -> Any:
        out = self.conv1(x)
        out = self.bn1.fused(out, relu=True)
        out = self.conv2(out)
        residual = residual_of(self.downsample, shortcut)
        return self.bn2.fused(out, *residual, relu=True, fork=fork)


class Bottleneck(FusedBlock, torchvision_resnet.Bottleneck):
    """conv1x1 - BN+ReLU - conv3x3 - BN+ReLU - conv1x1 - BN+add+ReLU, with the stride in the 3x3 convolution."""

    conv3: nn.Module
    bn3: FusedBatchNorm2d

    def fused_forward(self, x: Tensor, shortcut: Tensor | None, fork: bool = False) -> Any:
        out = self.bn1.fused(self.conv1(x), relu=True)
        out = self.bn2.fused(self.conv2(out), relu=True)
        out = self.conv3(out)
        residual = residual_of(self.downsample, shortcut)
        return self.bn3.fused(out, *residual, relu=True, fork=fork)


class PlainBlock(FusedBlock):
    """conv3x3 - BN+ReLU - conv3x3 - BN+ReLU: the basic block without its skip connection, under the same names.

    Args:
        inplanes, planes: channels before and after.
        stride: of the first convolution.
        norm_layer: makes a norm from a number of channels.
    """

    def __init__(self, inplanes: int, planes: int, stride: int, norm_layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.conv1 = torchvision_resnet.conv3x3(inplanes, planes, stride)
        self.bn1: Any = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = torchvision_resnet.conv3x3(planes, planes)
        self.bn2: Any = norm_layer(planes)
        self.downsample = None

    def steps(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))

    def fused_forward(self, x: Tensor, shortcut: Tensor | None, fork: bool = False) -> Any:
        """Return y, and with `fork` None as second handle, because plain blocks have no shortcut."""
        out = self.bn1.fused(self.conv1(x), relu=True)
        out = self.bn2.fused(self.conv2(out), relu=True)
        return (out, None) if fork else out


def residual_of(downsample: Any, shortcut: Any) -> tuple[Any, FusedBatchNorm2d | None]:
    """Return the shortcut, unchanged, padded or convolved, and the batch norm to apply to it, if any."""
    if downsample is None:
        return shortcut, None
    if type(downsample) is PaddedShortcut:
        return downsample(shortcut), None
    conv, norm = downsample
    return conv(shortcut), norm


def blocks_to_fuse(network: Any, stages: Sequence[nn.Module], x: Tensor) -> list[Any]:
    """Return all blocks of the stages in order, or none if they, `bn1` or `relu` were changed or are observed.

    The result is cached while the network has the same modules, because checking them all costs the host more than
    several fused operations.
    """
    if torch.compiler.is_compiling():
        return _blocks_to_fuse(network, stages, x)
    cached = _structures.get(network)
    if cached is not None and type(x) is Tensor and not nn.modules.module._has_any_global_hook():
        structure, blocks = cached
        if structure.is_current(network):
            return blocks
    blocks = _blocks_to_fuse(network, stages, x)
    if blocks:
        _structures[network] = Structure(network), blocks
    return blocks


def _blocks_to_fuse(network: Any, stages: Sequence[nn.Module], x: Tensor) -> list[Any]:
    if not is_fused(network.bn1) or type(network.relu) is not nn.ReLU or is_observed(network, x):
        return []
    if any(type(stage) is not nn.Sequential for stage in stages):
        return []
    blocks: list[Any] = [block for stage in stages for block in stage]  # type: ignore[attr-defined]
    return blocks if all(isinstance(block, FusedBlock) and block.can_fuse() for block in blocks) else []


def run_fused(norm: FusedBatchNorm2d, blocks: Sequence[Any], x: Tensor) -> Tensor:
    """Run a stem's batch norm and ReLU, then the blocks in order.

    A block's input has two consumers, its first convolution and its shortcut. Each gets its own handle, so that the
    backward of the operation that made the input adds the two gradients in registers.
    """
    if can_pair(x, all_norms(norm, blocks)) and all(type(block) is BasicBlock for block in blocks):
        return run_in_pairs(norm, blocks, x)
    has_shortcut = type(blocks[0]) is not PlainBlock
    x, shortcut = norm.fused(x, relu=True, fork=True) if has_shortcut else (norm.fused(x, relu=True), None)
    return run_blocks(blocks, x, shortcut)


def run_blocks(blocks: Sequence[Any], x: Tensor, shortcut: Tensor | None) -> Tensor:
    for block in blocks[:-1]:
        x, shortcut = block.fused_forward(x, shortcut, fork=True)
    return blocks[-1].fused_forward(x, shortcut)


def all_norms(norm: FusedBatchNorm2d, blocks: Sequence[Any]) -> Iterator[nn.Module]:
    yield norm
    for block in blocks:
        yield from (block.bn1, block.bn2)
        if type(block.downsample) is nn.Sequential:
            yield block.downsample[1]


def run_in_pairs(norm: FusedBatchNorm2d, blocks: Sequence[BasicBlock], x: Tensor) -> Tensor:
    """Compute what `run_fused` does, in pairs of a batch norm and the following 3x3 convolution."""
    x, statistics, shortcut = pair(norm, x, blocks[0].conv1, fork=True)
    for block, following in itertools.zip_longest(blocks, blocks[1:]):
        x, statistics, _ = pair(block.bn1, x, block.conv2, statistics)
        residual = residual_of(block.downsample, shortcut)
        is_last = following is None
        consumer = None if is_last else following.conv1
        x, statistics, shortcut = pair(block.bn2, x, consumer, statistics, *residual, fork=not is_last)
    return x
