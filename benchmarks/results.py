"""Rows of measurements in benchmarks/results/<device>/<benchmark>.csv, and the machine's columns in each row."""

import csv
import io
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

from resnet_fast import __version__
from resnet_fast.common.files import whole_file
from resnet_fast.common.machine import device_name, nvidia_driver, slug, triton_version

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


def device_slug(device: torch.device) -> str:
    """Return a folder name, such as nvidia-h100-80gb-hbm3 or, as a CPU's results depend on it, amd-epyc-2-threads."""
    name = slug(device_name(device))
    return name if device.type == "cuda" else f"{name}-{torch.get_num_threads()}-threads"


def no_gpu() -> str | None:
    """Return why nothing can be measured on an NVIDIA GPU here, or None."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "no NVIDIA GPU that torch can use; `resnet-fast doctor` says why"
    return None


def machine_columns(device: torch.device) -> dict[str, str]:
    """Return the columns that say where, with what and when a row was measured."""
    return {
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else "",
        "cpu_threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": triton_version(),
        "resnet_fast": __version__,
        "commit": commit(),
        "date_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def commit(root: Path = ROOT) -> str:
    """Return the commit of the checkout, with "-dirty" if files differ from it, or "unknown" outside git."""
    # A copy without .git inside another repository does not have that repository's commit.
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    head = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not top or not head or Path(top).resolve() != root.resolve():
        return "unknown"
    # Results are left out, because those just written would make the next row of the same code dirty.
    tree = ("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    changes = _output("git", "--no-optional-locks", "-C", str(root), *tree)
    return head if changes == "" else f"{head}-dirty"


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file as dicts by column; raise OSError if it does not exist."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a file; none if it does not exist.

    Raises:
        ValueError: its columns are not `columns`, so that new rows do not fit.
    """
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if list(reader.fieldnames or []) != list(columns):
        raise ValueError(f"{path.name} must have the columns {', '.join(columns)}; move the old file away")
    return rows


def replace_rows(path: Path, rows: Sequence[Mapping[str, str]], key: Sequence[str]) -> None:
    """Replace a file's rows that equal one of `rows` in the columns `key`, and append the rest of `rows`.

    All rows must have the same columns. The file is written completely or not at all.

    Raises:
        ValueError: the existing file has other columns.
    """

    def key_of(row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in key)

    merged: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in read_rows(path, list(rows[0])):
        merged.setdefault(key_of(row), []).append(row)
    for row in rows:
        merged[key_of(row)] = []
    for row in rows:
        merged[key_of(row)].append(row)
    write_rows(path, [row for group in merged.values() for row in group])


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a file of `rows`, which must have the same columns, completely or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


@cache
def _driver() -> str:
    return nvidia_driver() or "unknown"


def _output(*command: str) -> str | None:
    """Return a command's output without the last newline; None if the command is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None
