"""Rows of predicted kernels of a training step, and what they add up to."""

from collections.abc import Iterable
from typing import NamedTuple

from .gpus import Gpu

# Batch norms, additions and ReLU; `num_batches_tracked`; autocast's copies; what else is neither a convolution, the
# linear layer, the loss nor the optimizer.
GROUPS = ("batch norm", "counters", "casts", "rest")


class Row(NamedTuple):
    """A kernel: its launches in a step, and the time, without the launch, and bytes of one of them."""

    provider: str
    group: str
    kernel: str
    launches: int
    predicted_us: float
    bytes: float


class Totals(NamedTuple):
    """A step's predicted launches and microseconds, launches included; the rest is all groups but "batch norm"."""

    launches: int
    batch_norm_us: float
    rest_launches: int
    rest_us: float


def add_up(rows: Iterable[Row], gpu: Gpu) -> Totals:
    """Return the totals of one provider's rows."""
    launches, us = {True: 0, False: 0}, {True: 0.0, False: 0.0}
    for row in rows:
        is_batch_norm = row.group == "batch norm"
        launches[is_batch_norm] += row.launches
        us[is_batch_norm] += row.launches * (row.predicted_us + gpu.launch_us)
    return Totals(launches[True], us[True], launches[False], us[False])
