"""The candidates of a problem: every implementation of ops that can compute it, on the same inputs.

conv3x3 is compared together with the batch norm that it saves a pass: with the forward of the one behind it
(join "none"), or with the backward of the one before it. By default that batch norm runs as the table names it so far,
because what reads its input once has no pass to save.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.convolution import library_gradients
from resnet_fast.kernels.conv_tiles import ConvTiles
from resnet_fast.ops import BatchNormArgs
from resnet_fast.ops.arguments import Gradients, Join, Outputs, Saved, saved_of
from resnet_fast.ops.backend import conv3x3, launch, single_read
from resnet_fast.ops.batch_norm import backward_op, backward_with_sums, forward_op
from resnet_fast.ops.implementations import CONV3X3, CUDNN, REVERSED, SINGLE_READ, TWO_PASSES, Choice, Problem, tiles_of
from resnet_fast.tuning.inputs import (
    EPS,
    MOMENTUM,
    Inputs,
    exact_batch_norm,
    exact_batch_norm_backward,
    exact_convolution,
    exact_data_gradient,
    exact_weight_gradient,
    make_sets,
)
from resnet_fast.tuning.measurement import Candidate, Prepared


class Implementation(NamedTuple):
    """What a choice runs on a set of inputs, and its results by name; `saved` is the batch norm's forward's."""

    run: Callable[[Inputs, Saved | None], Any]
    named: Callable[[Any, Inputs], dict[str, Tensor]]


def candidates(problem: Problem, device: torch.device) -> Prepared:
    """Inputs, exact results, and every candidate; the default is the first."""
    sets = make_sets(problem, device)
    saved: list[Saved | None] = [None] * len(sets)
    first, terms = sets[0], {}
    y = first.x
    if problem.operation in ("data gradient", "batch norm backward"):
        outputs = [launch.forward(*_batch_norm(inputs), True) for inputs in sets]
        saved = [saved_of(*_batch_norm(inputs), of) for inputs, of in zip(sets, outputs, strict=True)]
        y = outputs[0].y
        del outputs
    if problem.operation == "batch norm":
        exact = exact_batch_norm(first)
        implementations = _batch_norms(problem, first)
    elif problem.operation == "batch norm backward":
        assert saved[0] is not None
        exact, terms = exact_batch_norm_backward(first, saved[0], y, first.dy)
        implementations = _batch_norms_backward(problem, first)
    elif problem.operation == "convolution":
        exact, terms = exact_convolution(first)
        implementations = _convolutions(problem)
    elif problem.operation == "data gradient":
        assert saved[0] is not None
        exact, terms = exact_batch_norm_backward(first, saved[0], y, exact_data_gradient(first))
        implementations = _data_gradients(problem)
    else:
        exact, terms = exact_weight_gradient(first)
        implementations = _weight_gradients(problem)
    pairs = list(zip(sets, saved, strict=True))
    return Prepared(
        exact, {choice: _candidate(implementation, pairs) for choice, implementation in implementations.items()}, terms
    )


def _candidate(of: Implementation, pairs: list[tuple[Inputs, Saved | None]]) -> Candidate:
    turns = cycle(pairs)
    return Candidate(lambda: of.run(*next(turns)), lambda: of.named(of.run(*pairs[0]), pairs[0][0]))


def _batch_norm(inputs: Inputs) -> tuple[Tensor, BatchNormArgs, Tensor | None, BatchNormArgs | None]:
    return inputs.x, inputs.norm, inputs.residual, inputs.residual_norm


def _batch_norms(problem: Problem, first: Inputs) -> dict[Choice, Implementation]:
    def named(outputs: Outputs, inputs: Inputs) -> dict[str, Tensor]:
        return {"y": outputs.y}

    implementations = {
        Choice(TWO_PASSES): Implementation(lambda i, s: launch.forward(*_batch_norm(i), True), named),
        Choice(REVERSED): Implementation(lambda i, s: launch.forward(*_batch_norm(i), True, reverse=True), named),
    }
    if single_read.fits(first.x, problem.operation, problem.join):
        implementations[Choice(SINGLE_READ)] = Implementation(
            lambda i, s: single_read.forward(*_batch_norm(i), True), named
        )
    return implementations


def _named_gradients(join: Join) -> Callable[[Gradients, Inputs], dict[str, Tensor]]:
    names = {"dx": "dx", "dweight": "dweight", "dbias": "dbias"}
    if join == "add":
        names |= {"dresidual": "dz"}
    if join == "bn":
        names |= {"dresidual": "dresidual_x", "dresidual_weight": "dresidual_weight"}
        names |= {"dresidual_bias": "dresidual_bias"}
    return lambda gradients, inputs: {theirs: getattr(gradients, ours) for ours, theirs in names.items()}


def _batch_norms_backward(problem: Problem, first: Inputs) -> dict[Choice, Implementation]:
    join: Join = problem.join  # type: ignore[assignment]
    named = _named_gradients(join)

    def arguments(inputs: Inputs, saved: Saved | None) -> tuple:
        return inputs.dy, inputs.alias, saved, join, True

    def two_passes(reverse: bool) -> Implementation:
        training = (True, join == "bn")
        return Implementation(lambda i, s: launch.backward(*arguments(i, s), *training, reverse=reverse), named)

    implementations = {Choice(TWO_PASSES): two_passes(False), Choice(REVERSED): two_passes(True)}
    if single_read.fits(first.x, problem.operation, join):
        implementations[Choice(SINGLE_READ)] = Implementation(
            lambda i, s: single_read.backward(*arguments(i, s)), named
        )
    return implementations


def _convolutions(problem: Problem) -> dict[Choice, Implementation]:
    norm, no_norm = BatchNormArgs(None, None, training=True, momentum=MOMENTUM, eps=EPS), BatchNormArgs(None, None)

    def cudnn(inputs: Inputs, saved: Saved | None) -> tuple[Tensor, Outputs]:
        y = F.conv2d(inputs.x, inputs.weight, padding=1)
        return y, Outputs(*forward_op(y, *norm, None, *no_norm, "none", True, 0))

    def own(tiles: ConvTiles) -> Callable[[Inputs, Saved | None], tuple[Tensor, Outputs]]:
        def run(inputs: Inputs, saved: Saved | None) -> tuple[Tensor, Outputs]:
            y, partials = conv3x3.forward(inputs.x, inputs.weight, tiles)
            return y, launch.forward(y, norm, None, None, True, partial=partials)

        return run

    def named(result: tuple[Tensor, Outputs], inputs: Inputs) -> dict[str, Tensor]:
        return {"y": result[0], "mean": result[1].mean[0]}

    return _with_tiles(problem, cudnn, own, named)


def _data_gradients(problem: Problem) -> dict[Choice, Implementation]:
    join: Join = problem.join  # type: ignore[assignment]
    settings = (join, True, True, join == "bn", 0)

    def cudnn(inputs: Inputs, saved: Saved | None) -> Gradients:
        assert saved is not None
        return Gradients(*backward_op(_gradient(inputs, wants_dx=True), inputs.alias, *saved, *settings))

    def own(tiles: ConvTiles) -> Callable[[Inputs, Saved | None], Gradients]:
        def run(inputs: Inputs, saved: Saved | None) -> Gradients:
            assert saved is not None
            dz, sums = conv3x3.data_gradient(inputs.dy, inputs.weight, tiles, saved, True, inputs.alias)
            return backward_with_sums(dz, sums, saved, join, residual_training=join == "bn")

        return run

    return _with_tiles(problem, cudnn, own, _named_gradients(join))


def _weight_gradients(problem: Problem) -> dict[Choice, Implementation]:
    """In fp32, as the weights are that the optimizer has; cuDNN's are in the type of x before that."""

    def cudnn(inputs: Inputs, saved: Saved | None) -> Tensor:
        return _gradient(inputs, wants_dx=False).float()

    def own(tiles: ConvTiles) -> Callable[[Inputs, Saved | None], Tensor]:
        return lambda inputs, saved: conv3x3.weight_gradient(inputs.x, inputs.dy, tiles, torch.float32)

    return _with_tiles(problem, cudnn, own, lambda dweight, inputs: {"dweight": dweight})


def _with_tiles(problem: Problem, cudnn: Callable, own: Callable, named: Callable) -> dict[Choice, Implementation]:
    implementations = {Choice(CUDNN): Implementation(cudnn, named)}
    return implementations | {Choice(CONV3X3, tiles): Implementation(own(tiles), named) for tiles in tiles_of(problem)}


def _gradient(inputs: Inputs, wants_dx: bool) -> Tensor:
    """As autograd computes it: one of the convolution's two gradients."""
    dx, dweight = library_gradients(inputs.dy, inputs.x, inputs.weight, wants_dx, not wants_dx)
    return dx if wants_dx else dweight  # type: ignore[return-value]
