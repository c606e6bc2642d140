"""Check a problem's candidates against the exact results, time them alternately, and choose the fastest.

A wrong candidate is never chosen, and neither is one whose gain may be noise.
"""

import gc
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import deterministic

from resnet_fast.ops.arguments import accumulation_type
from resnet_fast.ops.backend import INTERPRETER, cudnn_benchmark, device_guard, is_interpreted, why_not_triton
from resnet_fast.ops.implementations import DEFAULTS, Choice, Problem
from resnet_fast.tuning.options import ROUNDS
from resnet_fast.tuning.timing import alternate, percentiles

WARM_UP = 10
# The share of the default's time that another choice must save. Chosen, not measured: two tunings of one machine
# should agree, and losing 2 % of one operation is less than the variation of a step.
MIN_GAIN = 0.02
# Allowed roundings of a sum's terms in the accumulation type, as in tests/budget.py.
ROUNDINGS = 8
# Relative to the results and their terms: eight roundings of bf16. Candidates are judged by the default's error, so
# next to a wrong default all of them would pass.
MAX_ERROR_OF_DEFAULT = 8 * 2.0**-9


class Candidate(NamedTuple):
    """An implementation of a problem, bound to its inputs.

    Args:
        run: runs it once on the next set of inputs; there are more sets than a cache holds. This is timed.
        results: runs it once on the inputs whose exact results are known; returns each result by name.
    """

    run: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]


class Prepared(NamedTuple):
    """A problem prepared on a device.

    Args:
        exact: the results in fp64, by name.
        candidates: by choice; the default is among them.
        terms: for results that are sums, the largest sum of the terms' magnitudes, by name.
    """

    exact: Mapping[str, Tensor]
    candidates: Mapping[Choice, Candidate]
    terms: Mapping[str, float] = {}


Prepare = Callable[[Problem, torch.device], Prepared]


class Clock(Protocol):
    """The signature of `timing.alternate`: returns the milliseconds of every round, by name."""

    def __call__(
        self,
        calls: Mapping[Choice, Callable[[], object]],
        device: torch.device,
        rounds: int,
        warm_up: int,
        hide_launches: bool = False,
        refused: dict[Choice, Exception] | None = None,
    ) -> dict[Choice, list[float]]: ...


class Measured(NamedTuple):
    """The choice for a problem, and the times of all correct candidates, including the default."""

    choice: Choice
    milliseconds: Mapping[Choice, float]


@dataclass(frozen=True)
class Outcome:
    """The outcome of tuning a problem.

    Args:
        problem: the problem.
        measured: times and choice; None if the problem was skipped.
        wrong: for each candidate with wrong results, which is a bug, what is wrong.
        failed: for each candidate that cannot run, the reason, such as tiles too large for shared memory.
        skipped: why the problem was not measured.
    """

    problem: Problem
    measured: Measured | None = None
    wrong: Mapping[Choice, str] = field(default_factory=dict)
    failed: Mapping[Choice, str] = field(default_factory=dict)
    skipped: str = ""


def why_not(device: torch.device) -> str | None:
    """Return the reason why a device cannot be tuned; None if it can."""
    if device.type == "cpu":
        return "a CPU cannot be tuned, because its convolutions and batch norms are ATen's; tune needs a GPU"
    if is_interpreted():
        return f"the times of interpreted kernels are meaningless: unset {INTERPRETER}"
    reason = why_not_triton(device)
    return None if reason is None else f"there is nothing to tune, because no kernel is used here: {reason}"


def measure(
    problem: Problem, prepare: Prepare, device: torch.device, rounds: int = ROUNDS, clock: Clock = alternate
) -> Outcome:
    """Check and time the candidates that `prepare` makes, and choose one; skip the problem if memory runs out.

    Args:
        problem: what to compute.
        prepare: makes inputs, exact results and candidates.
        device: where to run.
        rounds: timed runs per candidate.
        clock: times the candidates.

    Raises:
        RuntimeError: the default fails, or its results are wrong.
    """
    try:
        with device_guard(torch.empty(0, device=device)), cudnn_benchmark(True):  # as in training
            return _measure(problem, prepare(problem, device), device, rounds, clock)
    except torch.OutOfMemoryError:
        return Outcome(problem, skipped="not enough memory")
    finally:
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # the blocks of this problem fit no other


def choose_fastest(default: Choice, milliseconds: Mapping[Choice, float]) -> Choice:
    """Return the fastest choice if it saves more than MIN_GAIN of the default's time, else the default."""
    fastest = min(milliseconds, key=lambda choice: milliseconds[choice])
    return fastest if milliseconds[fastest] < (1 - MIN_GAIN) * milliseconds[default] else default


def _measure(problem: Problem, prepared: Prepared, device: torch.device, rounds: int, clock: Clock) -> Outcome:
    default = DEFAULTS[problem.operation]
    default_results = _results(prepared.candidates[default])
    for name, result in default_results.items():
        error, size = _largest(result.double() - prepared.exact[name]), _largest(prepared.exact[name])
        if not error <= MAX_ERROR_OF_DEFAULT * (size + prepared.terms.get(name, 0.0)):
            raise RuntimeError(f"the default's {name} is off by {error:.3g} of {size:.3g} in {problem}")
    right, wrong, failed = {default: prepared.candidates[default].run}, {}, {}
    for choice, candidate in prepared.candidates.items():
        if choice == default:
            continue
        try:
            complaint = _complaint(_results(candidate), default_results, prepared)
            candidate.run()  # as in the timing, so that failures occur here
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # anything that a compiler raises; the others continue
            failed[choice] = _in_a_line(error)
            continue
        if complaint:
            wrong[choice] = complaint
        else:
            right[choice] = candidate.run
    unhidden: dict[Choice, Exception] = {}
    times = clock(right, device, rounds, WARM_UP, hide_launches=True, refused=unhidden)
    if default in unhidden:
        raise unhidden[default]
    failed |= {choice: _in_a_line(error) for choice, error in unhidden.items()}
    milliseconds = {choice: percentiles(choice_times)[1] for choice, choice_times in times.items()}
    return Outcome(problem, Measured(choose_fastest(default, milliseconds), milliseconds), wrong, failed)


def _complaint(results: Mapping[str, Tensor], default_results: Mapping[str, Tensor], prepared: Prepared) -> str:
    """Return what is wrong, or "". The allowed error is 2 x the default's + one rounding + those of a sum's terms."""
    for name, exact in prepared.exact.items():
        result = results[name]
        if result.shape != exact.shape:
            return f"{name} must have shape {tuple(exact.shape)}, got {tuple(result.shape)}"
        rounding, rounding_of_sums = (torch.finfo(dtype).eps / 2 for dtype in (result.dtype, accumulation_type(result)))
        allowed = 2 * _largest(default_results[name].double() - exact) + rounding * _largest(exact)
        allowed += ROUNDINGS * rounding_of_sums * prepared.terms.get(name, 0.0)
        error = _largest(result.double() - exact)
        if not error <= allowed < math.inf:  # NaN is not
            return f"{name} is off by {error:.3g}, allowed {allowed:.3g}"
    return ""


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _results(candidate: Candidate) -> dict[str, Tensor]:
    """Return a candidate's results in memory filled with NaN, so that an element never written shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about nondeterministic algorithms
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
            return candidate.results()
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            deterministic.fill_uninitialized_memory = fills  # type: ignore[assignment]
