"""A checkpoint: all that a run needs to go on, in one file that shows any damage.

It is a signed archive of torch.save (checkpoints/signature.py): `torch.load(path, weights_only=True)` reads it, too.
"""

import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from resnet_fast._version import __version__
from resnet_fast.checkpoints.archive import ArchiveError, load_values, read_regular
from resnet_fast.checkpoints.signature import COMMENT_BYTES, MARK, is_signed, is_whole, sign
from resnet_fast.common.checks import one_line, shown
from resnet_fast.common.files import unfinished_name, whole_file
from resnet_fast.training.schema import check_entries, fill_in

FORMAT = 2


class CheckpointError(RuntimeError):
    """A file is no checkpoint of this program, or damaged; the message is the reason, after the name of the file."""


def write_checkpoint(path: Path, state: dict[str, Any], previous: Path | None) -> None:
    """Replace the checkpoint `path`; the one that was there gets the name `previous`, if one is given.

    `path` is a whole checkpoint at every moment, and `previous` is one from the second on.

    Args:
        path: of the newest checkpoint.
        state: plain values and tensors on the CPU, in dicts, lists and tuples (`to_host`).
        previous: of the one before; None: what is there is not worth keeping.
    """
    # In memory first: on a full disk torch.save reports a fault of its archive, a plain write the full disk.
    archive = io.BytesIO()
    torch.save({"format": FORMAT, **state}, archive)
    sign(archive)
    with whole_file(path) as file:
        file.write(archive.getbuffer())
        if previous is not None and path.exists():
            # Before the old one loses its name, the new one must be on the disk.
            file.flush()
            os.fsync(file.fileno())
            _copy(path, previous)


def to_host(state: Any) -> Any:
    """Return a copy, on the CPU, of the tensors in nested dicts, lists and tuples, which no later step changes.

    It loads on a machine without a GPU. From a GPU all tensors are copied into pinned memory, and waited for once.
    """
    copied = _copy_tensors(state)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def read_checkpoint(path: Path, needed: Collection[str] = ()) -> dict[str, Any]:
    """Return what `write_checkpoint` wrote, after checking every byte and the entries that are needed.

    Args:
        path: of the checkpoint.
        needed: names of entries, which schema.py has rules for.

    Raises:
        CheckpointError: the file is missing, cut short, damaged, or of another program or format; or a needed entry is
            missing or breaks its rule.
    """
    try:
        data = read_regular(path)
        state = _read(data)
        check_entries(state, needed)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return state


def _read(data: bytes) -> dict[str, Any]:
    """Return the values; raise ValueError with the reason, to be put after the name of the file."""
    if not is_signed(data):
        raise ValueError(_what_else(data))
    if not is_whole(data):
        raise ValueError("is damaged: its SHA-256 is not the one that was written with it")
    try:
        state = load_values(data)
    except ArchiveError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError("holds more than plain values and tensors, which is not loaded") from error
    except Exception as error:  # torch.load raises any
        raise ValueError(f"is damaged: {one_line(error)}") from error
    number = state.get("format") if isinstance(state, dict) else None
    if not isinstance(number, int) or number != FORMAT:
        raise ValueError(
            f"has format {shown(number)}, resnet_fast {__version__} reads format {FORMAT}: "
            "the version that wrote it goes on with it"
        )
    return {name: fill_in(value) if name == "config" else value for name, value in state.items()}


def _what_else(data: bytes) -> str:
    """Say what a file without the mark is."""
    if not data:
        return "is empty"
    if not data.startswith(b"PK"):
        return "is no checkpoint: it does not begin as one"
    if MARK in data[-COMMENT_BYTES:] or not zipfile.is_zipfile(io.BytesIO(data)):
        return f"is cut short: its end is missing after {len(data):,} bytes"
    return "does not end in the checksum of `resnet-fast train`: it is of another program or of an older version"


def _copy(path: Path, copy: Path) -> None:
    """Give a file a second name, or, where the file system has no links, copy it; whole at every moment."""
    temporary = unfinished_name(copy)
    try:
        os.link(path, temporary)
    except OSError:
        with open(path, "rb") as source, whole_file(copy) as file:
            shutil.copyfileobj(source, file)
        return
    try:
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)  # also where both names are one file already: rename does nothing then


def _copy_tensors(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", non_blocking=True, copy=True)
    if isinstance(state, dict):
        return {key: _copy_tensors(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copy_tensors(value) for value in state)
    return state
