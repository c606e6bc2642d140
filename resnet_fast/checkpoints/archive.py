"""Read a file of torch.save as plain values: no code in it runs, and it takes no more memory than it has bytes.

    values = load_values(read_regular(path))

torch.load(weights_only=True) runs no code of the file. But it inflates compressed members, which torch.save never
writes, and calls functions that turn a few bytes into gigabytes. Both are refused before torch.load sees the file.
"""

import io
import os
import pickle
import pickletools
import stat
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fast.common.checks import one_line

# A ResNet-152 with its optimizer takes 100,000; the costliest step makes an empty set of 216 bytes.
MAX_STEPS = 1_000_000
MAX_DEPTH = 100  # of values within values
# `bytearray(10**10)` fills memory; the other two copy a tensor, which may be expanded to 10**10 values.
GROWING = ("bytearray", "_rebuild_device_tensor_from_cpu_tensor", "_rebuild_device_tensor_from_numpy")
# Each nearly doubles its input. torch.save itself writes bytes as _codecs.encode(text, "latin1").
GROWING_CODECS = {"hex", "hex_codec", "base64", "base64_codec", "base_64", "uu", "uu_codec", "quopri", "quopri_codec"}
GROWING_CODECS |= {"quoted_printable", "quotedprintable"}


class ArchiveError(ValueError):
    """A file is refused; the message is the reason, to follow the name of the file."""


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file; reading a fifo or a device might never end.

    Raises:
        ArchiveError: the file is not a regular file, or does not fit into memory.
        OSError: the file does not exist, or cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ArchiveError("is not a regular file")
    try:
        return path.read_bytes()
    except MemoryError:
        raise ArchiveError("does not fit into memory") from None


def member_names(data: bytes) -> list[str]:
    """Return the names of a zip archive's members."""
    return _open(data).namelist()


def load_values(data: bytes, permitted: Iterable[Any] = ()) -> Any:
    """Return what torch.save wrote, on the CPU: tensors in dicts, lists, tuples and sets, without attributes.

    Args:
        data: the bytes of a zip archive, or of torch.save's older format.
        permitted: classes that the file may hold in addition to tensors and plain values.

    Raises:
        ArchiveError: the values would take more memory than the file has bytes, or are nested too deep.
        pickle.UnpicklingError: the file holds other classes or functions, so that reading it would run code.
        Exception: any that torch.load raises for a damaged file.
    """
    if data.startswith(b"PK"):
        archive = _open(data)
        _check_members(archive, len(data))
        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                _check_steps(io.BytesIO(archive.read(name)))
    else:
        _check_steps(io.BytesIO(data), n_pickles=5)  # a mark, the version, the machine, the values, the storages
    with torch.serialization.safe_globals(list(permitted)):
        return _plain(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), {})


def _open(data: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(data))
    except Exception as error:  # such as names that are no text, or an unknown version
        raise ArchiveError(f"is damaged: {one_line(error)}") from error


def _check_members(archive: zipfile.ZipFile, n_bytes: int) -> None:
    """Raise ArchiveError unless the members are stored uncompressed and in sequence, as torch.save stores them."""
    end = 0
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ArchiveError(f"holds compressed data ({member.filename[:50]!r}), which torch.save never writes")
        # With bytes before the first member, another reader may find another table of contents.
        if member.header_offset < end or (end == 0 and member.header_offset > 0):
            raise ArchiveError("is damaged: its members do not follow each other")
        end = member.header_offset + 30 + member.file_size  # a header has at least 30 bytes
    if end > n_bytes:
        raise ArchiveError("is damaged: its members are larger than the file")
    if len(set(archive.namelist())) < len(archive.namelist()):
        raise ArchiveError("is damaged: two of its members have the same name")


def _check_steps(file: io.BytesIO, n_pickles: int = 1) -> None:
    """Raise ArchiveError if reading the pickles would take much more memory than they have bytes."""
    n_steps, encodes, codec = 0, False, ""
    for _ in range(n_pickles):
        for step, argument in _steps(file):
            n_steps += 1
            if n_steps > MAX_STEPS:
                raise ArchiveError(f"holds more than {MAX_STEPS:,} values")
            if step == "GLOBAL":
                name = argument.rpartition(" ")[2]
                if name in GROWING:
                    raise ArchiveError(f"asks for {name}, which can turn a few bytes into any amount of memory")
                encodes |= name == "encode"
            elif isinstance(argument, str) and argument.lower().replace("-", "_") in GROWING_CODECS:
                codec = argument
    if encodes and codec:
        raise ArchiveError(f"encodes values as {codec}, which can turn a few bytes into any amount of memory")


def _steps(file: io.BytesIO) -> Iterator[tuple[str, Any]]:
    try:
        for step, argument, _ in pickletools.genops(file):
            yield step.name, argument
    except ValueError as error:
        raise pickle.UnpicklingError(one_line(error)) from error


def _plain(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    """Rebuild a value from built-in types, because a file can set attributes that hide an object's methods.

    Args:
        seen: results by the id of their source, for values that occur in several places.
    """
    if isinstance(value, Tensor):
        if value.is_nested:
            raise ArchiveError("holds a nested tensor")
        return Tensor.detach(value)
    if not isinstance(value, dict) and type(value) not in (list, tuple):
        return value
    if id(value) not in seen:
        if depth == MAX_DEPTH:
            raise ArchiveError(f"holds values nested more than {MAX_DEPTH} deep, or within themselves")
        # The source is kept, too, because ids are unique only among living objects.
        if isinstance(value, dict):
            items = dict.items(value)
            seen[id(value)] = value, {key: _plain(inner, seen, depth + 1) for key, inner in items}
        else:
            seen[id(value)] = value, type(value)(_plain(inner, seen, depth + 1) for inner in value)
    return seen[id(value)][1]
