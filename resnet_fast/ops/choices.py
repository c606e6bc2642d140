"""Which implementation runs where there are several: one table per GPU, by operation, type and shape.

Without an entry convolutions are cuDNN's and a batch norm takes two passes over its input (kernels/README.md). Entries
are measured, by `resnet-fast tune`; none is guessed. Where they come from: choice_files.py.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from . import choice_files
from .implementations import DEFAULTS, Choice, Problem

_tables: dict[torch.device, Mapping[Problem, Choice]] = {}  # of this process, each read once
_replaced: list[Mapping[Problem, Choice]] = []


def choose(problem: Problem, device: torch.device) -> Choice:
    """The implementation that was measured to be the fastest, or the default."""
    return table(device).get(problem, DEFAULTS[problem.operation])


def table(device: torch.device) -> Mapping[Problem, Choice]:
    """All entries that count for tensors on `device`."""
    if _replaced:
        return _replaced[-1]
    if device not in _tables:
        _tables[device] = choice_files.read_table(device)
    return _tables[device]


def is_empty(device: torch.device) -> bool:
    """Whether every choice is the default."""
    return not table(device)


@contextmanager
def using(entries: Mapping[Problem, Choice]) -> Iterator[None]:
    """Have these entries, and no others, count inside the context: what measures and tests choose by.

    They count for the whole process, since a backward runs in threads of its own; so only one thread may use it.
    """
    _replaced.append(entries)
    try:
        yield
    finally:
        _replaced.pop()
