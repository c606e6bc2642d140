"""Rows of predicted kernels of a training step, and their totals."""

from collections.abc import Iterable
from typing import NamedTuple

# Batch norms, additions and ReLU; `num_batches_tracked`; autocast's copies; everything else except convolutions, the
# linear layer, the loss and the optimizer.
GROUPS = ("batch norm", "counter", "cast", "rest")


class Row(NamedTuple):
    """A kernel: its launches in a step, and the bytes and microseconds (without the launch's own) of one launch."""

    provider: str
    group: str
    kernel: str
    launches: int
    predicted_us: float
    bytes: float


class Totals(NamedTuple):
    """A step's launches, and their predicted microseconds without the launches' own.

    `launches` are the groups "batch norm" and "counter". The other groups are in `rest_launches`.
    """

    launches: int
    predicted_us: float
    rest_launches: int
    rest_predicted_us: float


def add_up(rows: Iterable[Row]) -> Totals:
    """Return the totals of one provider's rows."""
    launches, us = [0, 0], [0.0, 0.0]
    for row in rows:
        is_rest = row.group not in ("batch norm", "counter")
        launches[is_rest] += row.launches
        us[is_rest] += row.launches * row.predicted_us
    return Totals(launches[0], us[0], launches[1], us[1])
