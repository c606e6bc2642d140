"""The table of choices: the fastest implementation by operation, type and shape, as `resnet-fast tune` measured it.

Without an entry, cuDNN computes convolutions, and a batch norm makes two passes over its input (kernels/README.md).
Each GPU name has a file, $XDG_CACHE_HOME/resnet_fast/choices-<gpu>.json or ~/.cache/resnet_fast/choices-<gpu>.json:

    {"environment": {"gpu": …, "torch": …, "triton": …, "cudnn": …, "resnet_fast": …, "kernels": …},
     "entries": [{"problem": {…}, "choice": {"implementation": …, "tiles": null or {…}}}, …]}

A file applies only in the environment in which it was measured. It may hold anything, so every field is checked. A file
that does not apply gives one warning; no error here stops a training run.
"""

import hashlib
import json
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch

from resnet_fast._version import __version__
from resnet_fast.common.checks import check_choice, check_integer, one_line, shown
from resnet_fast.common.files import whole_file
from resnet_fast.common.machine import device_name, slug, triton_version

from .arguments import Join
from .implementations import CONV3X3, DEFAULTS, DTYPES, IMPLEMENTATIONS, Choice, Problem, tiles_of

SWITCH = "RESNET_FAST_TUNED"  # environment variable; "0" turns tables off
AGAIN = "delete it or run `resnet-fast tune` again"
KERNELS = Path(__file__).parents[1] / "kernels"
MAX_BYTES = 2**24  # ten times as much as thousands of entries need

Entries = Mapping[Problem, Choice]
Environment = dict[str, Any]  # everything that a measurement depends on, by name
_replaced: list[Entries] = []


def choose(problem: Problem, device: torch.device) -> Choice:
    """Return the implementation that was measured to be the fastest, or the default."""
    return table(device).get(problem, DEFAULTS[problem.operation])


def is_empty(device: torch.device) -> bool:
    """Return whether every choice is the default."""
    return not table(device)


def is_replaced() -> bool:
    """Return whether `using` has replaced the entries."""
    return bool(_replaced)


def table(device: torch.device) -> Entries:
    """Return all entries that apply to tensors on `device`."""
    return _replaced[-1] if _replaced else _load(device)


@contextmanager
def using(entries: Entries) -> Iterator[None]:
    """Replace all entries inside the context, for the whole process. Only one thread may use it at a time."""
    _replaced.append(entries)
    try:
        yield
    finally:
        _replaced.pop()


def is_off() -> bool:
    """Return whether tables are turned off, so that the defaults run."""
    return os.environ.get(SWITCH) == "0"


def environment_of(device: torch.device) -> Environment:
    """Return the environment in which a table for this GPU would be measured now."""
    # Read as text, the sources do not depend on line endings.
    sources = [f"{path.name}\n{path.read_text(encoding='utf-8')}\0" for path in sorted(KERNELS.glob("*.py"))]
    return {
        "gpu": device_name(device),
        "torch": str(torch.__version__),
        "triton": triton_version(),
        "cudnn": torch.backends.cudnn.version(),
        "resnet_fast": __version__,
        "kernels": hashlib.sha256("".join(sources).encode()).hexdigest()[:16],
    }


def find_table(environment: Environment) -> tuple[Path | None, Entries, str]:
    """Return the path for the environment's GPU, its entries, and why they do not apply ("" if they do).

    The file need not exist. The path is None if there is no home directory.
    """
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(cache_home) if os.path.isabs(cache_home) else Path.home() / ".cache"
    except RuntimeError:
        return None, {}, ""
    path = base / "resnet_fast" / f"choices-{slug(environment['gpu'])[:64]}.json"
    try:
        return path, read(path, environment), ""
    except (OSError, ValueError) as error:
        return path, {}, one_line(error, 300)


def read(path: Path, environment: Environment) -> dict[Problem, Choice]:
    """Return the entries of a table; none if the file does not exist.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a table of this environment; the message names the rule and the value.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return {}
    if not stat.S_ISREG(mode):  # reading a pipe would block
        raise ValueError(f"it must be a regular file, got {stat.filemode(mode)}")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it must have at most {MAX_BYTES:,} bytes, got more")
    try:
        found = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it must be JSON in UTF-8, got {one_line(error)}") from None
    _check_fields("the table", found, ("environment", "entries"))
    _check_fields("environment", found["environment"], environment)
    for name, ours in environment.items():
        if (theirs := found["environment"][name]) != ours:
            raise ValueError(f"it must have been measured with {name} {ours!r}, got {shown(theirs)}")
    if not isinstance(found["entries"], list):
        raise ValueError(f"entries must be a list, got {shown(found['entries'])}")
    return dict(map(_read_entry, found["entries"]))


def add(path: Path, environment: Environment, entries: Entries) -> None:
    """Add entries to a table, keeping those of other problems, or replace a file that does not apply.

    The file is written as a whole and without a lock. If two processes add at once, the last one wins: the other's
    entries may be missing until it adds again. `resnet-fast tune` adds all its entries after each problem.

    Raises:
        OSError: the file cannot be read or written; it is left unchanged.
    """
    try:
        there = read(path, environment)
    except ValueError:
        there = {}
    both = sorted({**there, **entries}.items())
    records = [{"problem": problem._asdict(), "choice": _as_json(choice)} for problem, choice in both]
    with whole_file(path) as file:
        file.write(json.dumps({"environment": environment, "entries": records}, indent=1).encode() + b"\n")


@cache
def _load(device: torch.device) -> Entries:
    """Read the file for `device` once per process, and warn if it does not apply."""
    if device.type != "cuda" or is_off():
        return {}
    try:
        path, entries, problem = find_table(environment_of(device))
    except Exception as error:  # a broken driver or disk can raise anything
        path, entries, problem = "the table of choices", {}, one_line(error)
    if problem:
        warnings.warn(f"{path} is not used, the defaults run: {problem}; {AGAIN}", stacklevel=2)
    return entries


def _read_entry(entry: Any) -> tuple[Problem, Choice]:
    _check_fields("an entry", entry, ("problem", "choice"))
    _check_fields("problem", entry["problem"], Problem._fields)
    problem = Problem(**entry["problem"])
    check_choice("operation", problem.operation, IMPLEMENTATIONS)
    check_choice("dtype", problem.dtype, DTYPES.values())
    check_choice("join", problem.join, get_args(Join))
    for name in ("n_images", "in_channels", "out_channels", "width"):
        check_integer(name, getattr(problem, name), below=2**31)
    if not isinstance(problem.fork, bool):
        raise ValueError(f"fork must be true or false, got {shown(problem.fork)}")
    for name in IMPLEMENTATIONS[problem.operation]:
        for tiles in tiles_of(problem) if name == CONV3X3 else [None]:
            if entry["choice"] == _as_json(choice := Choice(name, tiles)):
                return problem, choice
    raise ValueError(f"choice must be a known implementation of {problem.operation}, got {shown(entry['choice'])}")


def _as_json(choice: Choice) -> dict[str, Any]:
    return {"implementation": choice.implementation, "tiles": choice.tiles and choice.tiles._asdict()}


def _check_fields(name: str, value: Any, fields: Iterable[str]) -> None:
    if not isinstance(value, dict) or set(value) != set(fields):
        raise ValueError(f"{name} must have the fields {', '.join(fields)}, got {shown(value)}")
