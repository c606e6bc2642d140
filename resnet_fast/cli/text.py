"""Fit names and paths of any length and any characters into a line of 80 columns."""

import sys

from rich.cells import cell_len

WIDTH = 80


def fit(text: str, width: int) -> str:
    """Return the text cut or padded to `width` columns."""
    return _pad(head(text, width - 3) + "..." if cell_len(text) > width else text, width)


def fit_path(path: str, width: int) -> str:
    """Return a path cut in the middle to at most `width` columns: its beginning and the file's name tell most."""
    if cell_len(path) <= width:
        return path
    tail = (width - 3) * 2 // 3
    return head(path, width - 3 - tail) + "..." + head(path[::-1], tail)[::-1]


def head(text: str, width: int) -> str:
    """Return the beginning of the text, at most `width` columns."""
    while cell_len(text) > width:
        text = text[:-1]
    return text


def can_show(characters: str) -> bool:
    """Return whether standard output is a terminal that can show these characters."""
    if sys.stdout is None:  # closed
        return False
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return sys.stdout.isatty()


def _pad(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))
