"""What checks of arguments share, from models to commands: one rule for counts, one phrase for misspelt names."""

import difflib
from collections.abc import Iterable


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
