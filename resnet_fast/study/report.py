"""What a study found: a table, and sentences that follow from its numbers."""

import textwrap
from collections.abc import Sequence
from typing import Literal, NamedTuple

from resnet_fast.study.runs import EpochRow
from resnet_fast.study.settings import Network
from resnet_fast.training.console import format_duration
from resnet_fast.training.repeat import Spread

WIDTH = 80
# Percentage points. Of the digits' 1,437 images it is seven: two or three more or less say nothing about depth.
LEAST_DIFFERENCE = 0.5
Order = Literal["worse than", "as well as", "better than"]


class Comparison(NamedTuple):
    """Two networks' training errors after the last epoch, in percent.

    Args:
        order: how the deep one trains: as well as the shallow one unless the mean difference is at least
            LEAST_DIFFERENCE and larger than its standard deviation over the seeds.
        shallow, deep: over the seeds.
        difference: deep - shallow, of each seed.
    """

    order: Order
    shallow: Spread
    deep: Spread
    difference: Spread


def last_epochs(rows: Sequence[EpochRow], network: str) -> list[EpochRow]:
    """Return the row of the last epoch of each seed."""
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
    """Return what the numbers say about depth, in lines of 80 columns; of one seed the numbers alone.

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
        end = "Depth hurts without skip connections, and not with them."
    elif without:
        end = "Depth hurts without skip connections, and with them, too."
    elif with_them:
        end = "Depth hurts with skip connections alone: the opposite of what the paper found."
    else:
        end = "Depth hurts neither without skip connections nor with them."
    rule = f"(A difference counts from {LEAST_DIFFERENCE} points on, if it is above its standard deviation.)"
    return [*lines, *textwrap.wrap(end, WIDTH), rule]


def _format_one_seed(rows: Sequence[EpochRow], pairs: Sequence[tuple[str, str]]) -> list[str]:
    lines = []
    for small, large in pairs:
        result = compare(rows, small, large)
        lines.append(
            f"{large} has {result.deep.mean:.2f} % training error, {small} {result.shallow.mean:.2f} %: "
            f"{result.difference.mean:+.2f} points."
        )
    return [*lines, "One seed tells nothing about the spread: whether depth hurts takes several."]
