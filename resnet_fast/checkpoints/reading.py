"""A file of weights to the values in it, without running any code in it; or the reason why not, in one line."""

import argparse
import io
import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..common.checks import one_line
from .archive import ArchiveError, load_values, member_names, read_regular
from .signature import is_signed, is_whole

# timm and torchvision's reference scripts save the command line's settings beside the weights. A Namespace runs
# nothing when it is filled, and what is in it must be of the permitted types itself.
HARMLESS: list[Any] = [argparse.Namespace]
WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors")
SAVE_AGAIN = (
    "where its source is trusted, save the weights alone there, "
    "torch.save(model.state_dict(), path), and load that file"
)


def read_file(path: Path) -> Any:
    """Return what torch.save or safetensors wrote to `path`, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the system does not let it be read.
        ValueError: the file is a folder, a fifo, empty, damaged, something else than weights, would run code, or would
            take more memory than it has bytes.
        ModuleNotFoundError: it is of safetensors, which is not installed.
    """
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHTS_SUFFIXES)
        named = f"name a file in it: {', '.join(inside[:5])}" if inside else "no file of weights is in it"
        raise ValueError(f"{path} is a folder; {named}")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return _read(path, read_regular(path))
    except ArchiveError as error:
        raise ValueError(f"{path} {error}") from None


def _read(path: Path, data: bytes) -> Any:
    if reason := _what_else(data):
        raise ValueError(f"{path} {reason}")
    if path.suffix == ".safetensors" or _is_safetensors(data):
        return _read_safetensors(path, data)
    if data.startswith(b"PK"):
        _check_archive(path, data)
    elif not data.startswith(b"\x80") and not _is_tar(data):
        raise ValueError(f"{path} was not written by torch.save or safetensors: it begins with {data[:16]!r}")
    return _read_torch(path, data)


def _what_else(data: bytes) -> str:
    """Say what is often found under the name of a file of weights, or nothing."""
    if not data:
        return "is empty"
    begin = data[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begin.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs, not the weights: `git lfs pull` fetches them"
    if begin.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not weights: the download has failed"
    return ""


def _is_safetensors(data: bytes) -> bool:
    return data[8:9] == b"{" and 2 <= int.from_bytes(data[:8], "little") <= 100_000_000


def _is_tar(data: bytes) -> bool:
    return data[257:262] == b"ustar"


def _read_safetensors(path: Path, data: bytes) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs safetensors, which is not installed: pip install safetensors (or the extra 'safetensors')",
            name="safetensors",
        ) from error
    try:
        return load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a type that torch does not have
        raise ValueError(f"{path} is damaged, cut short or no file of safetensors: {one_line(error)}") from error


def _check_archive(path: Path, data: bytes) -> None:
    """Raise where a zip archive is not a whole one of torch.save."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise ValueError(f"{path} is cut short: the end of the archive is missing after {len(data):,} bytes")
    if is_signed(data) and not is_whole(data):
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one that was written with it")
    names = member_names(data)
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(f"{path} is a TorchScript program, which is code and is not loaded; {SAVE_AGAIN}")
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(f"{path} is a zip archive of something else: it holds {', '.join(names[:3]) or 'nothing'}")


def _read_torch(path: Path, data: bytes) -> Any:
    # `from None` below: torch's messages suggest to let the file run its code.
    if _is_tar(data) and tarfile.is_tarfile(io.BytesIO(data)):
        raise ValueError(f"{path} is of the tar format of PyTorch before 0.2, which is not loaded; {SAVE_AGAIN}")
    try:
        return load_values(data, HARMLESS)
    except ArchiveError:
        raise
    except pickle.UnpicklingError as error:
        # "… GLOBAL os.system …" where a class or function is asked for; other texts where the pickle is none.
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        if match is None and "allowlisted" not in str(error) and "Trying to call reduce" not in str(error):
            raise ValueError(
                f"{path} is damaged, or a pickle that is not read without running code; {SAVE_AGAIN}"
            ) from None
        what = f" ({match[1]})" if match else ""
        raise ValueError(
            f"{path} holds more than tensors and plain values{what}: reading that can run code of whoever made the "
            f"file, and it is not read; {SAVE_AGAIN}"
        ) from None
    except Exception as error:  # a damaged archive or pickle may raise anything
        raise ValueError(f"{path} is damaged or cut short: {one_line(error)}") from None
