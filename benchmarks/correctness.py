"""Checks before timing: a provider whose results are wrong is not timed."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class WrongProviderError(RuntimeError):
    """A provider's results are wrong, so it is not timed."""


def errors(results: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the L2 distance of every result from the exact one; infinite if it is missing or has another shape."""
    return {
        key: _norm(results[key].double() - value.double())
        if key in results and results[key].shape == value.shape
        else math.inf
        for key, value in exact.items()
    }


class Tolerance(NamedTuple):
    """How far a correct provider may be from fp64, beyond twice the baseline's own error.

    Args:
        rounding: the largest relative error of one rounding of the data type.
        n_roundings: number of roundings in sequence, layer after layer.
        n_rows: number of values in a sum over a channel, in fp32 and any order.
        n_elements: size of the smallest activation that enters a ReLU after roundings; 0 if there is none.
    """

    rounding: float
    n_roundings: int
    n_rows: int
    n_elements: int = 0

    def relative(self, key: str) -> float:
        """Return the tolerance of result `key` relative to its norm; gradients are called "d ...".

        Independent roundings add up as the square root of their number. A value within a rounding of ReLU's kink may
        fall on either side. No rounding bounds this: it changes the gradient by one of `n_elements` values. In fp32 a
        network has a few such values, here up to 10. In bf16 there are so many that the baseline has them, too.
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
    """Check that error against fp64 <= 2 x the baseline's own error + `tolerance` of the exact value, in L2 norm.

    The baseline's error is the cost of the precision. A correct provider need not be better, and a wrong one is off by
    far more than twice that. The tolerance is for values for which the baseline happens to be exact.

    Args:
        name: name of the provider, for the message.
        own, baseline: `errors` of the provider and of the baseline.
        exact: results in fp64.
        tolerance: tolerance of the setting.

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
