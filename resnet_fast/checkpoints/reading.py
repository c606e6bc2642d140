"""Read a file of weights without running any code in it, or give the reason for refusing it, in one line."""

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

# timm and torchvision's reference scripts save the command line's settings with the weights. Filling a Namespace runs
# nothing, and its contents must be of the permitted types, too.
HARMLESS: list[Any] = [argparse.Namespace]
WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors")
SAVE_AGAIN = (
    "if you trust its source, save the weights alone with the program that made it, "
    "torch.save(model.state_dict(), path), and load that file"
)


def read_file(path: Path) -> Any:
    """Return what torch.save or safetensors wrote to `path`, on the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the file cannot be read.
        ValueError: the file is a folder, a fifo, empty, damaged, something other than weights, would run code, or would
            take more memory than it has bytes.
        ModuleNotFoundError: the file needs safetensors, which is not installed.
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
    """Return what a file is that only has the name of a file of weights; "" if it may hold weights."""
    if not data:
        return "is empty"
    begin = data[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begin.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights: `git lfs pull` fetches them"
    if begin.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not weights: the download failed"
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
        raise ValueError(f"{path} is damaged, cut short or not a safetensors file: {one_line(error)}") from error


def _check_archive(path: Path, data: bytes) -> None:
    """Raise ValueError unless a zip archive is a complete one of torch.save."""
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
    # `from None` below, because torch's messages suggest letting the file run its code.
    if _is_tar(data) and tarfile.is_tarfile(io.BytesIO(data)):
        raise ValueError(f"{path} is in the tar format of PyTorch before 0.2, which is not loaded; {SAVE_AGAIN}")
    try:
        return load_values(data, HARMLESS)
    except ArchiveError:
        raise
    except pickle.UnpicklingError as error:
        # "… GLOBAL os.system …" if the file asks for a class or function; another text if it is not a pickle.
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        if match is None and "allowlisted" not in str(error) and "Trying to call reduce" not in str(error):
            raise ValueError(
                f"{path} is damaged, or a pickle that cannot be read without running code; {SAVE_AGAIN}"
            ) from None
        what = f" ({match[1]})" if match else ""
        raise ValueError(
            f"{path} holds more than tensors and plain values{what}: it is not read, because that could run code from "
            f"the file; {SAVE_AGAIN}"
        ) from None
    except Exception as error:  # a damaged archive or pickle may raise anything
        raise ValueError(f"{path} is damaged or cut short: {one_line(error)}") from None
