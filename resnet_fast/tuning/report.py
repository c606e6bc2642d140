"""The output of `resnet-fast tune`: plain lines of at most 80 columns, one per problem; "norm" is a batch norm."""

import textwrap
from collections.abc import Mapping, Sequence

from resnet_fast.ops.implementations import DEFAULTS, Choice, Problem
from resnet_fast.tuning.measurement import MIN_GAIN, Outcome

WIDTH = 80
INDENT = "    "
TITLE = f"{'':29}{'default':>10}{'fastest':>10}{'':10}choice"


def heading(problem: Problem) -> str:
    """Return the line above all problems of one batch size and width."""
    return f"{problem.dtype}, batch {problem.n_images}, maps of {problem.width}x{problem.width}"


def format_outcome(outcome: Outcome) -> list[str]:
    """Return the line of a problem: the times of the default and the fastest candidate, their ratio and the choice.

    Further lines report candidates that were not timed.
    """
    shape = f"  {_shape(outcome.problem):<27}"
    if outcome.measured is None:
        return fold(f"{shape}skipped: {outcome.skipped}")
    choice, milliseconds = outcome.measured
    default, fastest = milliseconds[DEFAULTS[outcome.problem.operation]], min(milliseconds.values())
    times = f"{default:>7.4g} ms{fastest:>7.4g} ms{default / fastest:>7.2f}x"
    lines = [f"{shape}{times}  {format_choice(choice)}"]
    for wrong, complaint in outcome.wrong.items():
        lines += fold(f"{INDENT}BUG: {format_choice(wrong)} is wrong and is not chosen: {complaint}; please report it")
    if outcome.failed:
        first, reason = next(iter(outcome.failed.items()))
        lines += fold(f"{INDENT}{len(outcome.failed)} cannot run here, such as {format_choice(first)}: {reason}")
    return lines


def format_end(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the summary of all problems."""
    entries = {outcome.problem: outcome.measured.choice for outcome in outcomes if outcome.measured is not None}
    lines = [f"{format_changed(entries)}; a gain of {MIN_GAIN:.0%} or less changes nothing."]
    if n_skipped := len(outcomes) - len(entries):
        lines.append(f"{n_skipped} skipped; problems that are not measured run as the default.")
    return lines


def format_changed(entries: Mapping[Problem, Choice]) -> str:
    """Return for how many problems the choice differs from the default."""
    n_changed = sum(choice != DEFAULTS[problem.operation] for problem, choice in entries.items())
    return f"{n_changed} of {len(entries)} differ from the default"


def format_choice(choice: Choice) -> str:
    """Return a choice in at most 22 columns; the file has the other settings of tiles."""
    if choice.tiles is None:
        return choice.implementation
    return f"{choice.implementation} {choice.tiles.block_m}x{choice.tiles.block_n}x{choice.tiles.block_k}"


def _shape(problem: Problem) -> str:
    channels = f"{problem.in_channels}"
    if problem.out_channels != problem.in_channels:
        channels += f">{problem.out_channels}"
    join = "" if problem.join == "none" else f" {problem.join}"
    return f"{problem.operation.removeprefix('batch ')} {channels}{join}{' fork' if problem.fork else ''}"


def fold(text: str) -> list[str]:
    """Return a text wrapped to 80 columns, with the indent of its first line."""
    indent = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, drop_whitespace=True)
