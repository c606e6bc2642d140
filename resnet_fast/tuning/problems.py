"""Which operations of a network's training step there is a choice for: one pass over it on the meta device tells.

Every fused batch norm of square maps, forward and backward; and in networks that run in pairs (pairs.py) every 3x3
convolution between two fused batch norms that the kernels have, forward and data gradient.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resnet_fast.models.blocks import BasicBlock, FusedBlock
from resnet_fast.models.registry import MODELS, check_name, get_model
from resnet_fast.nn import FusedBatchNorm2d
from resnet_fast.ops.implementations import IMPLEMENTATIONS, Operation, Problem
from resnet_fast.pairs import has_kernels


class _Norm(NamedTuple):
    """A fused batch norm as it ran."""

    x: Tensor
    y: Tensor
    join: str
    fork: bool


class _Convolution(NamedTuple):
    """A convolution as it ran, of those that the kernels have."""

    x: Tensor
    y: Tensor


class _Convolutions(TorchFunctionMode):
    """Notes every convolution within its context that the kernels have."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[_Convolution] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.conv2d and has_kernels(*args, **(kwargs or {})):
            self.seen.append(_Convolution(args[0], result))
        return result


def find_problems(
    model: str, stem: str | None, batch_sizes: Iterable[int], image_size: int, dtype: str
) -> list[Problem]:
    """Every problem of a training step, once: by batch size, from the widest maps to the narrowest, by operation.

    The wider the maps, the longer an operation takes, so that what is worth most comes first.

    Args:
        model, stem: as for training; None: the stem that training takes.
        batch_sizes: images of a step; a step for each, in this order.
        image_size: pixels, in height and width.
        dtype: "bf16" or "fp16", in which activations are.

    Raises:
        ValueError: there is no such network or stem.
        RuntimeError: the network cannot take such images.
    """
    check_name(model)
    stem = stem or MODELS[model].stems[0]
    order, problems = list(IMPLEMENTATIONS), []
    for size in batch_sizes:
        found = _step_problems(model, stem, size, image_size, dtype)
        problems += sorted(found, key=lambda problem: (-problem.width, order.index(problem.operation)))
    return list(dict.fromkeys(problems))


def _step_problems(model: str, stem: str, n_images: int, image_size: int, dtype: str) -> list[Problem]:
    convolutions, norms = _run(model, stem, n_images, image_size)
    normalized, made_by = {id(norm.x) for norm in norms}, {id(norm.y): norm for norm in norms}
    problems = []

    def note(operation: Operation, x: Tensor, y: Tensor, join: str = "none", fork: bool = False) -> None:
        problems.append(Problem(operation, dtype, n_images, x.shape[1], y.shape[1], x.shape[3], join, fork))

    for x, y in convolutions:
        if id(y) in normalized and (before := made_by.get(id(x))) is not None:
            note("convolution", x, y)
            note("data gradient", x, y, before.join, before.fork)  # beside which that batch norm's sums are computed
    for x, y, join, fork in norms:
        if x.dim() == 4 and x.shape[2] == x.shape[3]:
            note("batch norm", x, y, join)  # with a fork it computes the same
            note("batch norm backward", x, y, join, fork)
    return problems


def _run(model: str, stem: str, n_images: int, image_size: int) -> tuple[list[_Convolution], list[_Norm]]:
    """What runs in a network's forward pass in training, without computing it; convolutions where it runs in pairs."""
    with torch.device("meta"):
        network = get_model(model, stem=stem)
        images = torch.empty(n_images, 3, image_size, image_size)
    norms: list[_Norm] = []
    for module in network.modules():
        if isinstance(module, FusedBatchNorm2d):
            _watch(module, norms)
    with _Convolutions() as convolutions:
        network.train()(images)
    return convolutions.seen if _runs_in_pairs(network) else [], norms


def _runs_in_pairs(network: nn.Module) -> bool:
    """Whether `run_fused` of models/blocks.py may: there are no other blocks, and the stem does not pool."""
    blocks = {type(module) for module in network.modules() if isinstance(module, FusedBlock)}
    return blocks == {BasicBlock} and not any(isinstance(module, nn.MaxPool2d) for module in network.modules())


def _watch(norm: FusedBatchNorm2d, seen: list[_Norm]) -> None:
    """Note every pass of a batch norm. A hook would make the network run unfused; this the blocks do not see."""
    fused = norm.fused

    def noted(x: Tensor, residual: Tensor | None = None, residual_norm: Any = None, **settings: Any) -> Any:
        y = fused(x, residual, residual_norm, **settings)
        join = "none" if residual is None else "add" if residual_norm is None else "bn"
        fork = settings.get("fork", False)
        seen.append(_Norm(x, y[0] if fork else y, join, fork))
        return y

    norm.fused = noted  # type: ignore[method-assign]
