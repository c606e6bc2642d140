"""The learning rate as a fraction of its peak, per step, for exactly the number of steps that are run.

one-cycle (Smith & Topin 2017, torch's OneCycleLR and its defaults): with N steps and the peak at p = 0.3·N - 1,

    f(s) = cos_up(1/25 -> 1)              s in [0, p]
    f(s) = cos_down(1 -> 1/25 · 1e-4)     s in [p, N - 1]

triangular (KellerJordan/cifar10-zoo): with the peak at p = 0.2·N,

    f(s) = 0.2 + 0.8·s/p                  s in [0, p]
    f(s) = (N - s) / (N - p)              s in [p, N], so that the last step run, N - 1, still learns a little

cosine (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts), per step, never 0 at a step that is run:

    f(s) = (1 + cos(π·s/N)) / 2

linear (KellerJordan/cifar10-airbench, airbench94_muon), without warm-up:

    f(s) = 1 - s/N                        s in [0, N - 1]

steps (He et al. 2015, arXiv:1512.03385, section 4.2, whose drops are after 32k and 48k of 64k steps):

    f(s) = 1, 0.1, 0.01                   s in [0, N/2), [N/2, 3N/4), [3N/4, N)
"""

import math
from collections.abc import Callable


def one_cycle(step: int, n_steps: int) -> float:
    """Return the fraction of the peak learning rate at `step` of 0 … n_steps - 1."""
    first, last = 1 / 25, 1 / 25 * 1e-4
    peak = max(0.3 * n_steps - 1, 0.0)
    if step < peak:
        return _cosine(first, 1.0, step / peak)
    return _cosine(1.0, last, min((step - peak) / max(n_steps - 1 - peak, 1), 1.0))


def triangular(step: int, n_steps: int) -> float:
    """Return the fraction of the peak learning rate at `step` of 0 … n_steps - 1."""
    peak = 0.2 * n_steps
    if step < peak:
        return 0.2 + 0.8 * step / peak
    return max(n_steps - step, 0) / (n_steps - peak)


def cosine(step: int, n_steps: int) -> float:
    """Return the fraction of the peak learning rate at `step` of 0 … n_steps - 1."""
    return _cosine(1.0, 0.0, min(step / n_steps, 1.0))


def linear(step: int, n_steps: int) -> float:
    """Return the fraction of the peak learning rate at `step` of 0 … n_steps - 1."""
    return max(1 - step / n_steps, 0.0)


def steps(step: int, n_steps: int) -> float:
    """Return the fraction of the peak learning rate at `step` of 0 … n_steps - 1."""
    if step < n_steps / 2:
        return 1.0
    return 0.1 if step < 3 * n_steps / 4 else 0.01


def constant(step: int, n_steps: int) -> float:
    """Return 1."""
    return 1.0


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "one-cycle": one_cycle,
    "triangular": triangular,
    "cosine": cosine,
    "linear": linear,
    "steps": steps,
    "constant": constant,
}
