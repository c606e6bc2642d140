"""Files that are written completely or not at all, and locks for folders."""

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

# Seconds to wait for a folder's lock. The workers of a killed process share its lock, and end within 5.
PATIENCE = 10


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name only when it is complete and on the disk.

    If writing fails, an existing file remains unchanged. SIGINT and SIGTERM are delayed until the file is written, so
    that no unfinished file remains.

    Raises:
        OSError: the file cannot be written; `filename` is `path`.
    """
    unfinished = unfinished_name(path)
    with signals_wait():
        try:
            with open(unfinished, "xb") as file:  # O_EXCL follows no link
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException as error:
            unfinished.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno and error.filename in (None, os.fspath(unfinished)):
                # The error of a full disk names no file.
                raise OSError(error.errno, error.strerror, os.fspath(path)) from error
            raise


def unfinished_name(path: Path) -> Path:
    """Return an unpredictable name next to `path` that `delete_unfinished` recognizes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def delete_unfinished(path: Path) -> None:
    """Delete the files of processes that were killed while they wrote `path`."""
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        unfinished.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Lock the folder for this process in the block; the system releases the lock if the process is killed.

    On systems without such locks (Windows, some network file systems) nothing is locked.

    Args:
        folder: an existing folder.
        patience: seconds to wait for another process.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    if fcntl is None:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        _lock(number, folder, patience)
        yield
    finally:
        with suppress(OSError):  # also for processes that read images, which inherit the lock
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
        except OSError:  # the file system has no locks
            return
        time.sleep(0.1)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Delay SIGINT and SIGTERM to the end of the block. Only the main thread receives signals, so others do nothing."""
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
