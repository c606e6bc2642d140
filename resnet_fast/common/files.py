"""Files that are there as a whole or not at all, and folders that one process writes to."""

import glob
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

# Seconds to wait for a folder. The workers of a process that was killed hold it with that process, and notice within 5.
PATIENCE = 10


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only once it is complete and on the disk.

    An exception or a full disk on the way leaves what was there before. SIGINT and SIGTERM wait until it is written, so
    that no unfinished file stays behind.

    Raises:
        OSError: it cannot be written; `filename` is `path`.
    """
    unfinished = unfinished_name(path)
    with signals_wait():
        try:
            with open(unfinished, "xb") as file:  # O_EXCL, which follows no link
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException as error:
            unfinished.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno and error.filename in (None, os.fspath(unfinished)):
                raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # a full disk names no file
            raise


def unfinished_name(path: Path) -> Path:
    """Return an unpredictable name beside `path`, which `delete_unfinished` recognizes after a kill."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def delete_unfinished(path: Path) -> None:
    """Delete the files of processes that were killed while they wrote `path`."""
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        unfinished.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the folder for this process until the end of the block; the system lets go of it however the process ends.

    Where there are no such locks (Windows, some network file systems) nothing is held.

    Args:
        folder: an existing one.
        patience: seconds to wait for another process.

    Raises:
        BlockingIOError: another process holds it.
    """
    if fcntl is None:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        _lock(number, folder, patience)
        yield
    finally:
        with suppress(OSError):  # for the processes that read images, too, which have the same lock
            fcntl.flock(number, fcntl.LOCK_UN)
        os.close(number)


def _lock(number: int, folder: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[union-attr]
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise BlockingIOError(f"another process writes to {folder}") from None
        except OSError:  # not supported there
            return
        time.sleep(0.1)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM at the end of the block; only the main thread may, and needs to, do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for number in dict.fromkeys(arrived):
            signal.raise_signal(number)
