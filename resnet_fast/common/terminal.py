"""Keep escape codes in names, paths and files from the terminal, where they could move the cursor or hide a line.

    with clean_output():    # around a command: print, warnings and usage errors are clean
        ...

A progress bar, which itself writes escape codes, writes to `unfiltered(sys.stdout)` and cleans its texts.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


def clean(text: str, keep: str = "") -> str:
    """Return the text with "?" for each unprintable character, line breaks included, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() or character in keep else "?" for character in text)


class CleanStream:
    """A text stream that cleans what is written to it, and passes everything else to the underlying stream."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        line = text.lstrip("\r")  # a download's progress bar begins with it
        self.stream.write(text[: len(text) - len(line)] + clean(line, keep="\n\t"))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # typer would write bytes to it
            raise AttributeError(name)
        return getattr(self.stream, name)


@contextmanager
def clean_output() -> Iterator[None]:
    """Clean everything written to standard output and standard error in the block."""
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can encode every character
    cleaning: tuple[Any, Any] = _cleaned(sys.stdout), _cleaned(sys.stderr)
    sys.stdout, sys.stderr = cleaning
    try:
        yield
    finally:
        # If a pipe was closed, typer has installed other streams, which remain.
        if (sys.stdout, sys.stderr) == cleaning:
            sys.stdout, sys.stderr = before


def _cleaned(stream: TextIO | None) -> CleanStream:
    """Return a CleanStream; None stands for a stream that was closed before Python began, as by `>&-`."""
    return CleanStream(open(os.devnull, "w", encoding="utf-8") if stream is None else stream)


def unfiltered(stream: Any) -> TextIO:
    """Return the stream under a CleanStream; any other stream unchanged."""
    return stream.stream if isinstance(stream, CleanStream) else stream
