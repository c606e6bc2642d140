"""The gate before the clock: what is wrong, or interpreted, is not timed."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast.ops.backend import is_interpreted


class WrongProviderError(RuntimeError):
    """A provider does not compute what is asked for, so it is not timed."""


def refuse_interpreter() -> None:
    """Raise RuntimeError where Triton's kernels are interpreted: their time says nothing about compiled ones."""
    if is_interpreted():
        raise RuntimeError(
            "interpreted kernels are not timed: Triton's interpreter is thousands of times slower than what it "
            "interprets; unset TRITON_INTERPRET"
        )


def errors(results: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The L2 distance of every result from the exact one; infinite where it is missing or of another shape."""
    return {
        key: _norm(results[key].double() - value.double())
        if key in results and results[key].shape == value.shape
        else math.inf
        for key, value in exact.items()
    }


class Tolerance(NamedTuple):
    """How far a provider that is right may be from fp64, beyond twice what the baseline is.

    Args:
        rounding: the largest relative error of one rounding of the data type.
        n_roundings: how many of those follow each other, layer after layer.
        n_rows: values that a sum over a channel has, in fp32, in whatever order.
        n_elements: of the smallest activation behind which ReLUs stand that see rounded values; 0 where there are none.
    """

    rounding: float
    n_roundings: int
    n_rows: int
    n_elements: int = 0

    def relative(self, key: str) -> float:
        """Of the norm of a result; those that are called "d ..." are gradients.

        Independent roundings add up as the square root of their number. A value within a rounding of ReLU's kink may
        fall on either side, which no rounding bounds: it moves the gradient by one of `n_elements` values. In fp32
        there are a few of those in a network, here up to 10; in bf16 so many that the baseline has its share.
        """
        kinks = math.sqrt(10 / self.n_elements) if self.n_elements and key.startswith("d ") else 0.0
        return math.sqrt(self.n_roundings) * self.rounding + math.sqrt(self.n_rows) * 2.0**-24 + kinks


def check(
    name: str,
    own: Mapping[str, float],
    baseline: Mapping[str, float],
    exact: Mapping[str, Tensor],
    tolerance: Tolerance,
) -> None:
    """Error against fp64 <= 2 x the baseline's own error + `tolerance` of the exact value, in L2 norm.

    The baseline's own error is what the precision costs; no provider has to be better, and one that computes something
    else is off by far more than twice of it. The tolerance is for those values where the baseline happens to be exact.

    Args:
        name: of the provider, for the message.
        own, baseline: `errors` of the provider and of the baseline.
        exact: results in fp64.
        tolerance: of the setting.

    Raises:
        WrongProviderError: an error is larger, or NaN.
    """
    for key, value in exact.items():
        allowed = 2 * baseline[key] + tolerance.relative(key) * _norm(value)
        if not own[key] <= allowed:  # not "own > allowed", which NaN passes
            raise WrongProviderError(
                f"{name} is wrong and is not timed: the error of {key!r} must be at most {allowed:.3g}, "
                f"got {own[key]:.3g}"
            )


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.double()).item()
