"""What checks of arguments share, from models to commands: one rule for counts, one phrase for misspelt names."""

import difflib
import itertools
from collections.abc import Iterable, Sequence


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_integer(name: str, value: object, at_least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")


def did_you_mean(name: str, known: Iterable[str], at_most: int = 3) -> str:
    """Return the end of a message about a name that is not known: the nearest that are, or nothing."""
    nearest = difflib.get_close_matches(name, list(known), at_most)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""


def shown(value: object) -> str:
    """Return a value from a file as a message shows it: short, on one line, without codes for a terminal."""
    if value is None or isinstance(value, bool | float | str):
        text = repr(value)
    elif isinstance(value, int):
        text = str(value) if abs(value) < 10**50 else f"an integer of {value.bit_length()} bits"
    elif isinstance(value, list) and len(value) <= 4 and not any(isinstance(one, list) for one in value):
        text = f"[{', '.join(map(shown, value))}]"
    else:
        text = f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, list | tuple | dict) else "")
    return text if len(text) <= 60 else f"{text[:59]}…"


def difference(ours: Sequence[str], theirs: Sequence[str], us: str, them: str) -> str:
    """Return in which names two lists differ, however long they are; "" where they do not.

    Args:
        ours, theirs: the names.
        us, them: who has them, "the network" and "the data".
    """
    parts = []
    for names, others, who in ((ours, theirs, us), (theirs, ours, them)):
        known = set(others)
        if alone := [name for name in names if name not in known]:
            more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            parts.append(f"only {who} has {', '.join(map(shown, alone[:3]))}{more}")
    if parts:
        return "; ".join(parts)
    for i, (our, their) in enumerate(itertools.zip_longest(ours, theirs)):
        if our != their:
            place = f"the order differs from number {i + 1} on" if len(ours) == len(theirs) else "one has names twice"
            return f"{place}: {us} has {shown(our)}, {them} {shown(their)}"
    return ""
