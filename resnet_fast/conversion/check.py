"""Compare a converted model with the original on random images."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

# In fp64, relative L2 norm over all results: another order of summation gives 1e-12, a missing step 1e-2.
MAX_DIFFERENCE = 1e-6


def difference(model: nn.Module, converted: nn.Module, shape: tuple[int, ...], training: bool) -> float:
    """Return the relative L2 difference of outputs, gradients and statistics after one pass in fp64.

    Args:
        model, converted: the two models; neither is changed.
        shape: shape of the random images, [N, C, H, W].
        training: whether to run in training mode.

    Raises:
        ValueError: the model's outputs are not tensors.
        Exception: any error of the model itself.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    images = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    expected, actual = (_results(copy.deepcopy(each).double().train(training), images) for each in (model, converted))
    apart = sum((a - b).square().sum() for a, b in zip(actual, expected, strict=True))
    if apart == 0:  # avoids 0 / 0 if all results are zero
        return 0.0
    return float(apart / sum(value.square().sum() for value in expected)) ** 0.5


def _results(model: nn.Module, images: Tensor) -> list[Tensor]:
    torch.manual_seed(0)  # for dropout
    outputs = _tensors(model(images))
    learning = [output for output in outputs if output.requires_grad]
    if learning:  # empty for a frozen model
        torch.stack([output.square().sum() for output in learning]).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [value.detach().double() for value in (*outputs, *gradients, *model.buffers())]


def _tensors(outputs: Any) -> list[Tensor]:
    """Return all output tensors; torchvision's models with auxiliary outputs return tuples or dicts."""
    several = isinstance(outputs, dict | list | tuple)
    values = list(outputs.values() if isinstance(outputs, dict) else outputs if several else [outputs])
    kinds = dict.fromkeys(type(value).__name__ for value in values if not isinstance(value, Tensor | None))
    if kinds or not any(isinstance(value, Tensor) for value in values):
        got = f"{type(outputs).__name__} of {' and '.join(kinds) or 'none'}" if several else " ".join(kinds) or "None"
        raise ValueError(f"outputs must be tensors, or a tuple, list or dict of them, got {got}")
    return [value for value in values if isinstance(value, Tensor)]  # None stands for an omitted output
