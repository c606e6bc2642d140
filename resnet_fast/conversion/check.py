"""Whether a converted model computes what it computed, on random images."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

# In fp64, of all results together, in L2 norm: another order of summation gives 1e-12, a step left out 1e-2.
MAX_DIFFERENCE = 1e-6


def difference(model: nn.Module, converted: nn.Module, shape: tuple[int, ...], training: bool) -> float:
    """Return how far output, gradients and statistics of one pass in fp64 differ, in units of their own L2 norm.

    Args:
        model, converted: neither is changed.
        shape: of the random images, [N, C, H, W].
        training: the mode.
    """
    device = next(model.parameters()).device
    images = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    expected, found = (_results(copy.deepcopy(each).double().train(training), images) for each in (model, converted))
    apart = sum((a - b).square().sum() for a, b in zip(found, expected, strict=True))
    return float(apart / sum(value.square().sum() for value in expected)) ** 0.5


def _results(model: nn.Module, images: Tensor) -> list[Tensor]:
    torch.manual_seed(0)  # of dropout
    outputs = _tensors(model(images))
    sum(output.square().sum() for output in outputs).backward()  # type: ignore[union-attr]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [value.detach().double() for value in (*outputs, *gradients, *model.buffers())]


def _tensors(outputs: Any) -> list[Tensor]:
    """Of a tensor, or of a tuple, list or dict of them, as torchvision's models with auxiliary outputs give."""
    values = (
        outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, list | tuple) else [outputs]
    )
    return [value for value in values if isinstance(value, Tensor)]
