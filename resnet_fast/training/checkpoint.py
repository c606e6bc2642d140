"""A checkpoint: all that a run needs to resume, in one file that reveals any damage.

It is a signed archive of torch.save (checkpoints/signature.py), which `torch.load(path, weights_only=True)` reads, too.
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
    """A file is not a checkpoint of this program, or is damaged; the message names the file and the reason."""


def write_checkpoint(path: Path, state: dict[str, Any], previous: Path | None) -> None:
    """Replace the checkpoint at `path`, and keep the old one at `previous` if that is given.

    At every moment `path` is a complete checkpoint; from the second checkpoint on, so is `previous`.

    Args:
        path: path of the newest checkpoint.
        state: plain values and tensors on the CPU, in dicts, lists and tuples (`to_host`).
        previous: path of the checkpoint before; None: do not keep it.
    """
    # In memory first: on a full disk, torch.save reports a broken archive, but a plain write reports the full disk.
    archive = io.BytesIO()
    torch.save({"format": FORMAT, **state}, archive)
    sign(archive)
    with whole_file(path) as file:
        file.write(archive.getbuffer())
        if previous is not None and path.exists():
            # The new one must be on the disk before the old one loses its name.
            file.flush()
            os.fsync(file.fileno())
            _copy(path, previous)


def to_host(state: Any) -> Any:
    """Return a copy of nested dicts, lists and tuples with all tensors copied to the CPU, where no step changes them.

    It loads on a machine without a GPU. Tensors on a GPU are copied into pinned memory, with one wait for all.
    """
    copied = _copy_tensors(state)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def read_checkpoint(path: Path, needed: Collection[str] = ()) -> dict[str, Any]:
    """Return the state that `write_checkpoint` wrote, after checking every byte and the needed entries.

    Args:
        path: path of the checkpoint.
        needed: names of the entries that must be there; schema.py has their rules.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated, damaged, or of another program or format; or a
            needed entry is missing or breaks its rule.
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
    """Return the values; raise ValueError with a reason that follows the name of the file."""
    if not is_signed(data):
        raise ValueError(_what_else(data))
    if not is_whole(data):
        raise ValueError("is damaged: its SHA-256 is not the one stored in it")
    try:
        state = load_values(data)
    except ArchiveError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError("must hold plain values and tensors only, and holds other objects") from error
    except Exception as error:  # torch.load may raise any error
        raise ValueError(f"is damaged: {one_line(error)}") from error
    number = state.get("format") if isinstance(state, dict) else None
    if not isinstance(number, int) or number != FORMAT:
        raise ValueError(
            f"has format {shown(number)}, resnet_fast {__version__} reads format {FORMAT}: "
            "resume it with the version that wrote it"
        )
    return {name: fill_in(value) if name == "config" else value for name, value in state.items()}


def _what_else(data: bytes) -> str:
    """Return the reason why a file is not signed."""
    if not data:
        return "is empty"
    if not data.startswith(b"PK"):
        return "is not a checkpoint: it does not begin like one"
    if MARK in data[-COMMENT_BYTES:] or not zipfile.is_zipfile(io.BytesIO(data)):
        return f"is cut short: its end is missing after {len(data):,} bytes"
    return "has no checksum of `resnet-fast train`: another program or an older version wrote it"


def _copy(path: Path, copy: Path) -> None:
    """Link `copy` to a file, or copy the file if the file system has no links; `copy` is complete at every moment."""
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
        temporary.unlink(missing_ok=True)  # if both names are already one file, replace does nothing


def _copy_tensors(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", non_blocking=True, copy=True)
    if isinstance(state, dict):
        return {key: _copy_tensors(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copy_tensors(value) for value in state)
    return state
