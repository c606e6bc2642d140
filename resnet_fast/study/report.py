"""The results of a study: a table, and conclusions drawn from its numbers."""

import textwrap
from collections.abc import Sequence
from typing import Literal, NamedTuple

from resnet_fast.study.runs import EpochRow
from resnet_fast.study.settings import Network
from resnet_fast.training.console import format_duration
from resnet_fast.training.repeat import Spread

WIDTH = 80
# Percentage points: seven of the digits' 1,437 images. A difference of two or three images says nothing about depth.
LEAST_DIFFERENCE = 0.5
Order = Literal["worse than", "as well as", "better than"]


class Comparison(NamedTuple):
    """Two networks' training errors after the last epoch, in percent.

    Args:
        order: how the deep network trains: "as well as" the shallow one, unless the mean difference is at least
            LEAST_DIFFERENCE and larger than its standard deviation over the seeds.
        shallow, deep: errors over the seeds.
        difference: deep - shallow, over the seeds.
    """

    order: Order
    shallow: Spread
    deep: Spread
    difference: Spread


def last_epochs(rows: Sequence[EpochRow], network: str) -> list[EpochRow]:
    """Return the row of the last epoch for each seed of a network."""
    last = max((row.epoch for row in rows), default=0)
    return [row for row in rows if row.network == network and row.epoch == last]


def compare(rows: Sequence[EpochRow], shallow: str, deep: str) -> Comparison:
    """Compare the training errors of two networks that were trained with the same seeds."""
    errors = [[100 * row.train_error for row in last_epochs(rows, name)] for name in (shallow, deep)]
    difference = Spread.of([b - a for a, b in zip(*errors, strict=True)])
    order: Order = "as well as"
    if abs(difference.mean) >= LEAST_DIFFERENCE and abs(difference.mean) > difference.std:
        order = "worse than" if difference.mean > 0 else "better than"
    return Comparison(order, Spread.of(errors[0]), Spread.of(errors[1]), difference)


def format_table(rows: Sequence[EpochRow], networks: Sequence[Network]) -> list[str]:
    """Return a line for each network: errors after the last epoch, mean ± standard deviation over several seeds."""
    lines = ["network      training error (%)     test error (%)  training"]
    for network in networks:
        last = last_epochs(rows, network.name)
        train, test = (
            _format_percent([100 * getattr(row, name) for row in last]) for name in ("train_error", "test_error")
        )
        seconds = sum(row.seconds for row in rows if row.network == network.name) / len(last)
        lines.append(f"{network.name:<11}  {train:>18}  {test:>17}  {format_duration(seconds):>8}")
    return lines


def _format_percent(values: Sequence[float]) -> str:
    spread = Spread.of(values)
    return f"{spread.mean:.2f} ± {spread.std:.2f}" if len(values) > 1 else f"{spread.mean:.2f}"


def format_verdict(rows: Sequence[EpochRow], networks: Sequence[Network]) -> list[str]:
    """Return the conclusion about depth, in lines of 80 columns; for a single seed only the numbers.

    Args:
        rows: of all networks.
        networks: plain and shallow, plain and deep, then the two with skip connections.
    """
    plain_shallow, plain_deep, shallow, deep = (network.name for network in networks)
    pairs = ((plain_shallow, plain_deep), (shallow, deep))
    if len(last_epochs(rows, deep)) == 1:
        return _format_one_seed(rows, pairs)
    lines, orders = [], []
    for small, large in pairs:
        result = compare(rows, small, large)
        orders.append(result.order)
        lines += textwrap.wrap(
            f"{large} trains {result.order} {small}: {result.deep.mean:.2f} % against {result.shallow.mean:.2f} % "
            f"training error, a difference of {result.difference.mean:+.2f} ± {result.difference.std:.2f} points.",
            WIDTH,
        )
    without, with_them = (order == "worse than" for order in orders)
    if without and not with_them:
        end = "Depth hurts without skip connections, but not with them."
    elif without:
        end = "Depth hurts both with and without skip connections."
    elif with_them:
        end = "Depth hurts only with skip connections, the opposite of the paper's result."
    else:
        end = "Depth hurts neither with nor without skip connections."
    rule = f"(A difference counts from {LEAST_DIFFERENCE} points, if it is above its standard deviation.)"
    return [*lines, *textwrap.wrap(end, WIDTH), rule]


def _format_one_seed(rows: Sequence[EpochRow], pairs: Sequence[tuple[str, str]]) -> list[str]:
    lines = []
    for small, large in pairs:
        result = compare(rows, small, large)
        lines.append(
            f"{large} has {result.deep.mean:.2f} % training error, {small} {result.shallow.mean:.2f} %: "
            f"{result.difference.mean:+.2f} points."
        )
    return [*lines, "One seed shows no spread: run several seeds to tell whether depth hurts."]
