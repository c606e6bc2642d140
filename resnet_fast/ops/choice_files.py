"""Where the tables of choices are: one's own in a cache folder, by GPU and versions, and those of ops/tuned.

Own entries go before built-in ones. Nothing here stops a training: what cannot be read is not used, with one warning.
"""

import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from resnet_fast._version import __version__
from resnet_fast.common.files import only_writer, whole_file
from resnet_fast.common.machine import device_name, slug, triton_version

from . import choice_format
from .choice_format import Entries, Environment, Measured
from .implementations import DEFAULTS, Choice, Problem

SWITCH = "RESNET_FAST_TUNED"  # the environment variable: "0" turns all tables off
AGAIN = "run `resnet-fast tune` again, which replaces it"
TUNED = Path(__file__).parent / "tuned"
KERNELS = Path(__file__).parents[1] / "kernels"
NOT_CHOSEN_AMONG = ("augment.py",)  # of the kernels
MAX_BYTES = 2**24  # a table of thousands of entries takes a tenth
MAX_NAME = 64  # of a GPU, in a file's name


@dataclass(frozen=True)
class Tables:
    """What there is for a GPU.

    Args:
        own: the file of one's own, which may not be there; None where there is no folder for it.
        entries: its entries.
        problem: why it does not count, where it is there and does not.
        built_in, built_in_entries, built_in_problem: the same of the file that ships with the package; None where none
            does.
        others: tables of this GPU with other versions, which are not used and not touched.
    """

    own: Path | None = None
    entries: Entries = field(default_factory=dict)
    problem: str = ""
    built_in: Path | None = None
    built_in_entries: Entries = field(default_factory=dict)
    built_in_problem: str = ""
    others: tuple[Path, ...] = ()

    @property
    def all_entries(self) -> Entries:
        return self.built_in_entries | self.entries


def is_off() -> bool:
    """Whether tables are turned off, so that the defaults run."""
    return os.environ.get(SWITCH) == "0"


def read_table(device: torch.device) -> Mapping[Problem, Choice]:
    """What counts for tensors on `device`: nothing but on a GPU. Nothing is raised; a damaged file is warned of."""
    if device.type != "cuda" or is_off():
        return {}
    try:
        tables = find_tables(environment_of(device))
    except Exception as error:  # whatever a broken driver or disk raises: training goes on without
        warnings.warn(f"no table of choices can be read ({error!r}); the defaults run", stacklevel=2)
        return {}
    if tables.problem:
        warnings.warn(f"{tables.own} is not used: {tables.problem}; {AGAIN}", stacklevel=2)
    return {problem: measured.choice for problem, measured in tables.all_entries.items()}


def environment_of(device: torch.device) -> Environment:
    """With what a table for this GPU is measured now."""
    return Environment(
        gpu=device_name(device),
        torch=torch.__version__,
        triton=triton_version(),
        cudnn=torch.backends.cudnn.version(),
        resnet_fast=__version__,
        kernels=hash_of_kernels(),
    )


@cache
def hash_of_kernels(folder: Path = KERNELS) -> str:
    """Of the sources that are chosen among, whatever their line ends: other kernels have other times."""
    sources = sorted(path for path in folder.glob("*.py") if path.name not in NOT_CHOSEN_AMONG)
    digest = hashlib.sha256()
    for path in sources:
        digest.update(f"{path.name}\n{path.read_text(encoding='utf-8')}\0".encode())
    return digest.hexdigest()[:16]


def own_path(environment: Environment) -> Path | None:
    """One's own table. Each GPU and versions have a file of their own, so that no installation touches another's.

    None where the system names no home.
    """
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # As the standard says, a relative path does not count.
        base = Path(cache_home) if os.path.isabs(cache_home) else Path.home() / ".cache"
    except RuntimeError:
        return None
    digest = hashlib.sha256(repr(tuple(environment)).encode()).hexdigest()[:12]
    return base / "resnet_fast" / "tune" / f"{_short(environment)}.{digest}.json"


def find_tables(environment: Environment) -> Tables:
    """One's own table and the built-in one; what is wrong with them is told, not raised."""
    own, built_in = own_path(environment), TUNED / f"{_short(environment)}.json"
    entries, problem, others = {}, "", ()
    if own is not None:
        entries, problem = _try_to_read(environment, own)
        others = _others(own, environment)
    built_in_entries, built_in_problem = _try_to_read(environment, built_in, ("gpu", "kernels"))
    there = built_in if built_in_entries or built_in_problem else None
    return Tables(own, entries, problem, there, built_in_entries, built_in_problem, others)


def read_file(path: Path) -> tuple[Environment, Entries]:
    """A table.

    Raises:
        OSError: it cannot be read; FileNotFoundError: it is not there.
        ValueError: it is no table; the message says why.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise ValueError("it is no file")
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    return choice_format.read(text)


def check_can_add(path: Path, environment: Environment, is_own: bool) -> str:
    """See that a table can be added to, before anything is measured, and make its folder.

    Returns:
        What is wrong with the file that is there and will be replaced, or nothing. Only one's own is replaced.

    Raises:
        ValueError: there is something else, or a table of another GPU or other versions.
        OSError: the folder cannot be made, written to or locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(path.parent):
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        try:
            _read_for(environment, path)
        except ValueError as error:
            if is_own and not path.is_dir():
                return str(error)
            raise ValueError(f"{path} must be a new file or a table to which this GPU can add: {error}") from None
    return ""


def add(path: Path, environment: Environment, entries: Mapping[Problem, Measured]) -> None:
    """Put entries into a table, in the place of those of the same problems; what another process added meanwhile stays.

    A file that is no table of this environment is replaced.

    Raises:
        OSError: it cannot be read or written, and is what it was before; BlockingIOError: another process holds the
            folder.
    """
    with only_writer(path.parent):
        try:
            there = _read_for(environment, path)
        except ValueError:
            there = {}
        text = choice_format.write(environment, {**there, **entries})
        with whole_file(path) as file:
            file.write(text.encode())


def count_changed(entries: Mapping[Problem, Measured]) -> int:
    """Of how many problems something other than the default is the choice."""
    return sum(measured.choice != DEFAULTS[problem.operation] for problem, measured in entries.items())


def _read_for(environment: Environment, path: Path, fields: tuple[str, ...] = Environment._fields) -> Entries:
    """The entries of a table that is of this environment, as far as `fields` tell; none where there is no file.

    Raises:
        OSError, ValueError: as `read_file`; or it is of another environment.
    """
    try:
        recorded, entries = read_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for name in fields:
        theirs, ours = getattr(recorded, name), getattr(environment, name)
        if theirs != ours:
            raise ValueError(f"it was measured with {name} {ascii(theirs):.60}, here it is {ours!r}")
    return entries


def _try_to_read(
    environment: Environment, path: Path, fields: tuple[str, ...] = Environment._fields
) -> tuple[Entries, str]:
    """The same, or why there are none."""
    try:
        return _read_for(environment, path, fields), ""
    except OSError as error:
        return {}, f"it cannot be read ({error.strerror or error})"
    except ValueError as error:
        return {}, str(error)


def _others(own: Path, environment: Environment) -> tuple[Path, ...]:
    try:
        return tuple(sorted(path for path in own.parent.glob(f"{_short(environment)}.*.json") if path != own))
    except OSError:
        return ()


def _short(environment: Environment) -> str:
    return slug(environment.gpu)[:MAX_NAME]
