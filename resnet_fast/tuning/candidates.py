"""The candidates of a problem: every implementation of ops that can compute it, on the same inputs.

conv3x3 is timed together with the batch norm that it saves a pass: the forward of the next batch norm (join "none"), or
the backward of the previous one. In the default, that batch norm runs as the table says so far, because an
implementation that reads its input once has no pass to save.
"""

from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.kernels.conv_tiles import ConvTiles
from resnet_fast.ops import BatchNormArgs, arguments
from resnet_fast.ops.arguments import Gradients, Join, Outputs, PartialStatistics, Saved, Settings, arguments_of
from resnet_fast.ops.backend import conv3x3, launch, single_read
from resnet_fast.ops.batch_norm import backward, forward
from resnet_fast.ops.implementations import CONV3X3, CUDNN, REVERSED, SINGLE_READ, TWO_PASSES, Choice, Problem, tiles_of
from resnet_fast.pairs import gradients_by_kernels, library_gradients
from resnet_fast.tuning.inputs import (
    EPS,
    MOMENTUM,
    TYPES,
    Inputs,
    exact_batch_norm,
    exact_batch_norm_backward,
    exact_convolution,
    exact_data_gradient,
    make_sets,
)
from resnet_fast.tuning.measurement import Candidate, Prepared

# Runs a choice on a set of inputs, and on the tensors that the batch norm's forward saved for its backward.
Run = Callable[[Inputs, Any], Any]


def candidates(problem: Problem, device: torch.device) -> Prepared:
    """Return inputs, exact results and every candidate of a problem; the default comes first."""
    sets = make_sets(problem, device)
    first, saved, terms = sets[0], [None] * len(sets), {}
    if problem.operation == "batch norm":
        exact, runs = exact_batch_norm(first), _batch_norms(problem, first)
        named = _named_outputs
    elif problem.operation == "convolution":
        (exact, terms), runs = exact_convolution(first), _convolutions(problem, device)
        named = _named_convolution
    else:
        outputs = [launch.forward(*_batch_norm(inputs)) for inputs in sets]
        saved = [Saved.of(*_batch_norm(inputs), of) for inputs, of in zip(sets, outputs, strict=True)]
        y = outputs[0].y
        del outputs
        is_norm = problem.operation == "batch norm backward"
        dy = first.dy if is_norm else exact_data_gradient(first)
        exact, terms = exact_batch_norm_backward(first, saved[0], y, dy)
        runs = _batch_norms_backward(problem, first) if is_norm else _data_gradients(problem, device)
        named = _named_gradients(_join(problem))
    turns_of = list(zip(sets, saved, strict=True))

    def candidate(run: Run) -> Candidate:
        turns = cycle(turns_of)
        return Candidate(lambda: run(*next(turns)), lambda: named(run(*turns_of[0])))

    return Prepared(exact, {choice: candidate(run) for choice, run in runs.items()}, terms)


def tiles_on(problem: Problem, device: torch.device) -> list[ConvTiles]:
    """Return the block sizes of conv3x3 that fit the device's shared memory; none if it cannot pipeline."""
    if not conv3x3.is_pipelined(device):
        return []
    return [tiles for tiles in tiles_of(problem) if conv3x3.fits(tiles, TYPES[problem.dtype], device)]


def has_choice(problem: Problem, device: torch.device) -> bool:
    """Return whether a problem has candidates other than the default."""
    return problem.operation.startswith("batch norm") or bool(tiles_on(problem, device))


def _join(problem: Problem) -> Join:
    return problem.join  # type: ignore[return-value]


def _settings(problem: Problem) -> Settings:
    return Settings(_join(problem), True, True, problem.join == "bn", 0, EPS, EPS)


def _batch_norm(inputs: Inputs) -> tuple[arguments.Inputs, Settings]:
    return arguments_of(inputs.x, inputs.norm, inputs.residual, inputs.residual_norm)


def _named_outputs(outputs: Outputs) -> dict[str, Tensor]:
    return {"y": outputs.y}


def _named_convolution(results: tuple[Tensor, Outputs]) -> dict[str, Tensor]:
    return {"y": results[0], "mean": results[1].mean[0]}


def _named_gradients(join: Join) -> Callable[[Gradients], dict[str, Tensor]]:
    names = {"dx": "dx", "dweight": "dweight", "dbias": "dbias"}
    if join == "add":
        names |= {"dresidual": "dz"}
    if join == "bn":
        names |= {"dresidual": "dresidual_x", "dresidual_weight": "dresidual_weight"}
        names |= {"dresidual_bias": "dresidual_bias"}
    return lambda gradients: {theirs: getattr(gradients, ours) for ours, theirs in names.items()}


def _batch_norms(problem: Problem, first: Inputs) -> Mapping[Choice, Run]:
    runs: dict[Choice, Run] = {
        Choice(TWO_PASSES): lambda inputs, saved: launch.forward(*_batch_norm(inputs)),
        Choice(REVERSED): lambda inputs, saved: launch.forward(*_batch_norm(inputs), reverse=True),
    }
    if single_read.fits(first.x, problem.operation, problem.join):
        runs[Choice(SINGLE_READ)] = lambda inputs, saved: single_read.forward(*_batch_norm(inputs))
    return runs


def _batch_norms_backward(problem: Problem, first: Inputs) -> Mapping[Choice, Run]:
    join = _join(problem)
    settings = _settings(problem)

    def two_passes(inputs: Inputs, saved: Saved, reverse: bool = False) -> Gradients:
        return launch.backward(inputs.dy, inputs.alias, saved, settings, reverse=reverse)

    runs: dict[Choice, Run] = {
        Choice(TWO_PASSES): two_passes,
        Choice(REVERSED): lambda inputs, saved: two_passes(inputs, saved, reverse=True),
    }
    if single_read.fits(first.x, problem.operation, join):
        runs[Choice(SINGLE_READ)] = lambda inputs, saved: single_read.backward(inputs.dy, inputs.alias, saved, settings)
    return runs


def _convolutions(problem: Problem, device: torch.device) -> Mapping[Choice, Run]:
    norm = BatchNormArgs(None, None, training=True, momentum=MOMENTUM, eps=EPS)

    def batch_norm(y: Tensor, statistics: PartialStatistics | None = None) -> Outputs:
        return forward(*arguments_of(y, norm), statistics)

    def cudnn(inputs: Inputs, saved: None) -> tuple[Tensor, Outputs]:
        y = F.conv2d(inputs.x, inputs.weight, padding=1)
        return y, batch_norm(y)

    def own(tiles: ConvTiles) -> Run:
        def run(inputs: Inputs, saved: None) -> tuple[Tensor, Outputs]:
            y, statistics = conv3x3.forward(inputs.x, inputs.weight, tiles)
            return y, batch_norm(y, statistics)

        return run

    return _with_tiles(problem, device, cudnn, own)


def _data_gradients(problem: Problem, device: torch.device) -> Mapping[Choice, Run]:
    settings = _settings(problem)

    def cudnn(inputs: Inputs, saved: Saved) -> Gradients:
        dy, _ = library_gradients(inputs.dy, inputs.x, inputs.weight, True, False)
        assert dy is not None
        return backward(dy, inputs.alias, saved, settings)

    def own(tiles: ConvTiles) -> Run:
        def run(inputs: Inputs, saved: Saved) -> Gradients:
            return gradients_by_kernels(inputs.dy, inputs.weight, tiles, saved, settings, inputs.alias)

        return run

    return _with_tiles(problem, device, cudnn, own)


def _with_tiles(
    problem: Problem, device: torch.device, cudnn: Run, own: Callable[[ConvTiles], Run]
) -> Mapping[Choice, Run]:
    return {Choice(CUDNN): cudnn} | {Choice(CONV3X3, tiles): own(tiles) for tiles in tiles_on(problem, device)}
