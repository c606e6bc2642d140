"""Text that fits: names and paths of any length and any characters, in a line of 80 columns."""

import sys

from rich.cells import cell_len

WIDTH = 80


def fit(text: str, width: int) -> str:
    """Return the text, cut at the end, filled up to `width` columns."""
    return _pad(head(text, width - 3) + "..." if cell_len(text) > width else text, width)


def fit_path(path: str, width: int) -> str:
    """Return a path of at most `width` columns, cut in the middle: the beginning and the file's name tell most."""
    if cell_len(path) <= width:
        return path
    tail = (width - 3) * 2 // 3
    return head(path, width - 3 - tail) + "..." + head(path[::-1], tail)[::-1]


def head(text: str, width: int) -> str:
    """Return as much of the beginning as `width` columns hold."""
    while cell_len(text) > width:
        text = text[:-1]
    return text


def can_show(characters: str) -> bool:
    """Return whether standard output is a terminal that shows these characters."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return sys.stdout.isatty()


def _pad(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))
