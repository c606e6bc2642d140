"""Bytes and operations of a run, from which floors and bandwidths are computed.

In training, for every provider, bytes are those of the fused two-pass design (kernels/README.md, "Bytes moved per
element"); a provider that moves more shows a lower bandwidth. They leave out the convolutions' own traffic, partial
sums and vectors (1 % at batch 512). In inference norms need no pass of their own, and bytes are those of the layers
(`inference_work`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Work(NamedTuple):
    """Bytes moved, and floating-point operations of convolutions and the linear layer."""

    bytes: float
    flops: float = 0.0


class Role(NamedTuple):
    """A fused operation of ResNet-18 in training mode; each ends in ReLU."""

    name: str
    join: str
    fork: bool

    def __str__(self) -> str:
        return self.name


STEM = Role("BN+ReLU, forked (stem)", "none", True)
INNER = Role("BN+ReLU (A)", "none", False)
BLOCK = Role("BN+add+ReLU, forked (B)", "add", True)
LAST = Role("BN+add+ReLU (last block)", "add", False)
PROJECTION = Role("bn join, forked (B + C)", "bn", True)

STAGES = ((64, 32), (128, 16), (256, 8), (512, 4))  # channels, map width
# (role, channels, map width) of ResNet-18 with the 3x3 stem on 32x32 images.
NETWORK = [(STEM, *STAGES[0])]
for stage in STAGES:
    NETWORK += [(INNER, *stage), (PROJECTION if stage != STAGES[0] else BLOCK, *stage)]
    NETWORK += [(INNER, *stage), (LAST if stage == STAGES[-1] else BLOCK, *stage)]


def operation_bytes(join: str, fork: bool, direction: str, n_elements: int, item_size: int) -> float:
    """Return the bytes of one fused operation that ends in ReLU, over a tensor of `n_elements`.

    Args:
        join: "none", "add" or "bn".
        fork: whether y has two consumers, which matters only in the backward.
        direction: "forward", "backward" or "both".
        n_elements: number of elements of x.
        item_size: bytes per element, 2 for bf16.
    """
    has_residual = join != "none"
    # Tensors read and written, and with a residual ReLU bits (1/8 byte), once in each direction.
    forward = 3 + has_residual + (join == "bn")
    backward = 5 + (has_residual or fork) + fork + 3 * (join == "bn")
    images = forward * (direction != "backward") + backward * (direction != "forward")
    bits = has_residual * (2 if direction == "both" else 1)
    return n_elements * (images * item_size + bits / 8)


def network_bytes(n_images: int, item_size: int) -> float:
    """Return the bytes of all fused operations in a training step of ResNet-18 with the 3x3 stem on 32x32 images."""
    return sum(
        operation_bytes(role.join, role.fork, "both", n_images * n_channels * width * width, item_size)
        for role, n_channels, width in NETWORK
    )


def flops(make_model: Callable[[], nn.Module], input_shape: tuple[int, ...], input_needs_gradient: bool) -> float:
    """Return the floating-point operations of a forward and backward pass (2 per multiply-add), from meta tensors."""
    with torch.device("meta"):
        model, x = make_model(), torch.empty(input_shape, requires_grad=input_needs_gradient)
    with FlopCounterMode(display=False) as counter:
        y: Tensor = model(x)
        y.sum().backward()
    return float(counter.get_total_flops())


def inference_work(make_model: Callable[[], nn.Module], n_images: int, item_size: int) -> Work:
    """Return bytes and operations of ResNet-18's forward pass, 3x3 stem, 32x32 images, in evaluation mode:

        bytes = item_size · (W + N · (Σ_layers (inputs + outputs) + Σ_joins outputs))

    W is the number of weights; layers are convolutions, pooling and the linear layer. Each layer reads its input and
    its weights once and writes its output once. Norm, addition and ReLU happen before the output is written; for the
    addition a block also reads its shortcut (the joins). The norms' vectors are left out.
    """
    weights, activations = 0, 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal weights, activations
        weights += layer.weight.numel() if isinstance(layer, nn.Conv2d | nn.Linear) else 0
        activations += inputs[0].numel() + output.numel()

    with torch.device("meta"):
        model, x = make_model().eval(), torch.empty(1, 3, STAGES[0][1], STAGES[0][1])
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.AdaptiveAvgPool2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    activations += sum(n_channels * width * width for role, n_channels, width in NETWORK if role.join != "none")
    return Work(item_size * (weights + n_images * activations), n_images * counter.get_total_flops())
