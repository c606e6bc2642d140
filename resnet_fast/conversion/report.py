"""The report of a conversion: the outcome for each batch norm, and the reason."""

import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import Literal

WIDTH, NAME_WIDTH = 80, 32


@dataclass(frozen=True)
class Outcome:
    """The outcome for one batch norm.

    Args:
        name: its name in `named_modules`.
        status: "converted" or "left".
        what: the steps that are one operation now, "BN", "BN+ReLU", "BN+add+ReLU" …; "" if it was left.
        why: the reason why it was left, or converted without the following steps; "" if there is none.
    """

    name: str
    status: Literal["converted", "left"]
    what: str
    why: str


@dataclass(frozen=True)
class Report:
    """The outcomes for one model; str() gives a table of at most 80 columns.

    Args:
        outcomes: in the order of `named_modules`.
        notes: remarks on the model as a whole.
    """

    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.status == "converted")

    @property
    def left(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.status == "left")

    def __str__(self) -> str:
        width = min(NAME_WIDTH, max((len(outcome.name) for outcome in self.outcomes), default=0))
        lines = [line for outcome in self.outcomes for line in _lines(outcome, width)]
        counts = Counter(outcome.what for outcome in self.converted)
        kinds = ", ".join(f"{count} {what}" for what, count in counts.items())
        lines.append(f"converted {len(self.converted)}{f' ({kinds})' if kinds else ''}, left {len(self.left)}")
        notes = [line for note in self.notes for line in textwrap.wrap(note, WIDTH)]
        return "\n".join([*lines, *notes])


def _lines(outcome: Outcome, width: int) -> list[str]:
    """Return one line, with the reason below it if it does not fit."""
    start = f"{outcome.name or '(the model)':{width}}  {outcome.what or 'left':13}"
    if not outcome.why:
        return [start.rstrip()]
    if len(start) + 2 + len(outcome.why) <= WIDTH:
        return [f"{start}  {outcome.why}"]
    return [start.rstrip(), *textwrap.wrap(outcome.why, WIDTH, initial_indent="    ", subsequent_indent="    ")]
