"""Find the operations of a network's training step that can be tuned, by one pass on the meta device.

These are the forward and backward of each fused batch norm with square maps. In networks that run in pairs (pairs.py),
they are also the forward and data gradient of each 3x3 convolution between two fused batch norms that has kernels.
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
    """One run of a fused batch norm."""

    x: Tensor
    y: Tensor
    join: str
    fork: bool


class _Convolution(NamedTuple):
    """One run of a convolution that has kernels."""

    x: Tensor
    y: Tensor


class _Convolutions(TorchFunctionMode):
    """A context that records every convolution that has kernels."""

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
    """Return the distinct problems of a training step: by batch size, then from wide maps to narrow, then by operation.

    The wider the maps, the longer an operation takes, so the most valuable problems come first.

    Args:
        model, stem: as for training; stem None: the default of the model.
        batch_sizes: images per step, in the order of the problems.
        image_size: height and width, in pixels.
        dtype: of the activations, "bf16" or "fp16".

    Raises:
        ValueError: there is no such network or stem.
        RuntimeError: the network does not support images of this size.
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
            note("data gradient", x, y, before.join, before.fork)  # the kernel also computes that batch norm's sums
    for x, y, join, fork in norms:
        if x.dim() == 4 and x.shape[2] == x.shape[3]:
            note("batch norm", x, y, join)  # a fork does not change the forward
            note("batch norm backward", x, y, join, fork)
    return problems


def _run(model: str, stem: str, n_images: int, image_size: int) -> tuple[list[_Convolution], list[_Norm]]:
    """Return the convolutions, if they run in pairs, and batch norms of a training forward pass on the meta device."""
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
    """Return whether `run_fused` of models/blocks.py runs in pairs: only BasicBlocks, and no pooling in the stem."""
    blocks = {type(module) for module in network.modules() if isinstance(module, FusedBlock)}
    return blocks == {BasicBlock} and not any(isinstance(module, nn.MaxPool2d) for module in network.modules())


def _watch(norm: FusedBatchNorm2d, seen: list[_Norm]) -> None:
    """Record every pass of a batch norm. A hook would make the network run unfused; the blocks do not notice this."""
    fused = norm.fused

    def noted(x: Tensor, residual: Tensor | None = None, residual_norm: Any = None, **settings: Any) -> Any:
        y = fused(x, residual, residual_norm, **settings)
        join = "none" if residual is None else "add" if residual_norm is None else "bn"
        fork = settings.get("fork", False)
        seen.append(_Norm(x, y[0] if fork else y, join, fork))
        return y

    norm.fused = noted  # type: ignore[method-assign]
