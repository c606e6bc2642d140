"""Argument checks, whose messages name the rule and the value in one line."""

import difflib
import itertools
import math
import numbers
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MAX_SHOWN = 60  # characters of a value
URL_RULE = "an http:// or https:// URL without a user name"


def shown(value: object) -> str:
    """Return `value` as one line of at most 60 characters, for a message."""
    if isinstance(value, list | tuple | dict) and len(value) > 4:
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**50:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # deep nesting, or a __repr__ that raises
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def one_line(error: Exception, at_most: int = 150) -> str:
    """Return an exception's message, or its type if it has none, as one line of at most `at_most` characters."""
    return " ".join(str(error).split())[:at_most] or type(error).__name__


def few(names: Sequence[str], at_most: int, separator: str = ", ") -> str:
    """Return the first `at_most` names, and the number of the others."""
    more = f" and {len(names) - at_most:,} more" if len(names) > at_most else ""
    return separator.join(names[:at_most]) + more


def is_text(value: object) -> bool:
    """Return whether `value` is a str that a file name can hold: valid UTF-8 without NUL."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def is_integer(value: object) -> bool:
    """Return whether `value` is an integer of Python or numpy; a bool is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether `value` is a finite real number of Python or numpy; a bool is not."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def check_integer(name: str, value: Any, at_least: int = 1, below: int = 2**100) -> int:
    """Return `value` as an int; raise ValueError unless it is an integer with at_least <= value < below."""
    if not is_integer(value) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {shown(value)}")
    if value >= below:
        raise ValueError(f"{name} must be below {below:,}, got {shown(value)}")
    return int(value)


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")


def check_path(name: str, value: Any) -> Path:
    """Return `value` as a Path with ~ expanded; raise ValueError unless it is a path in UTF-8."""
    got = shown(str(value) if isinstance(value, Path) else value)
    try:
        path = Path(value).expanduser()
    except RuntimeError:
        raise ValueError(f"{name} must name an existing user after ~, got {got}") from None
    except (TypeError, ValueError):
        path = None
    if path is None or not is_text(str(path)):
        raise ValueError(f"{name} must be a path in UTF-8, got {got}")
    return path


def check_url(name: str, value: Any) -> str:
    """Return `value`; raise ValueError unless it is an http or https URL without a user name."""
    try:
        parts = urlsplit(value) if isinstance(value, str) and re.fullmatch("[!-~]+", value) else urlsplit("")
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
        is_url = is_url and parts.port != 0  # urlsplit checks a port only when it is read
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError(f"{name} must be {URL_RULE}, got {shown(value)}")
    return str.__str__(value)


def check_type(name: str, value: object, *kinds: type) -> None:
    """Raise TypeError unless `value` has one of the types `kinds`."""
    if not isinstance(value, kinds):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise TypeError(f"{name} must be of type {expected}, got {type(value).__name__}")


def did_you_mean(name: str, candidates: Iterable[str], at_most: int = 3) -> str:
    """Return the end of a message about an unknown name: "; did you mean …?" with the nearest candidates, or ""."""
    nearest = difflib.get_close_matches(name, list(candidates), at_most)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""


def difference(ours: Sequence[str], theirs: Sequence[str], us: str, them: str) -> str:
    """Return in one line how two lists of names differ; "" if they are equal.

    Args:
        ours, theirs: the lists.
        us, them: their owners, such as "the network" and "the data".
    """
    parts = []
    for names, others, who in ((ours, theirs, us), (theirs, ours, them)):
        in_others = set(others)
        if alone := [name for name in names if name not in in_others]:
            parts.append(f"only {who} has {few([shown(name) for name in alone], 3)}")
    if parts:
        return "; ".join(parts)
    for i, (our, their) in enumerate(itertools.zip_longest(ours, theirs)):
        if our != their:
            place = f"the order differs from number {i + 1} on" if len(ours) == len(theirs) else "one has names twice"
            return f"{place}: {us} has {shown(our)}, {them} {shown(their)}"
    return ""
