"""Read a folder benchmarks/results/<device>/ for the report: measurements, and where they come from."""

import csv
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from benchmarks import bench_block, bench_conv, bench_inference, bench_loader, bench_op, bench_step
from benchmarks.harness import COLUMNS, KEY, Level

LEVELS: dict[str, Level] = {
    module.LEVEL.name: module.LEVEL
    for module in (bench_step, bench_inference, bench_block, bench_op, bench_conv, bench_loader)
}
LIMITS, PROFILE = "limits", "profile"
MACHINE = ("device", "driver", "cpu_threads", "torch", "triton", "resnet_fast", "commit", "date_utc")
MAY_BE_EMPTY = {"mbytes", "gflop", "gb_per_s", "floor_ms", "of_floor", "peak_mb", "driver", "triton"}


class Origin(NamedTuple):
    """Where, with what and on which day a row was measured."""

    day: str
    commit: str
    device: str
    driver: str
    cpu_threads: str
    torch: str
    triton: str
    resnet_fast: str

    def __str__(self) -> str:
        where = f"driver {self.driver}" if self.driver else f"{self.cpu_threads} threads"
        what = [self.device, where, f"torch {self.torch}", f"triton {self.triton or 'not installed'}"]
        return ", ".join([*what, f"resnet_fast {self.resnet_fast}", f"commit {self.commit}", self.day])


class Spread(NamedTuple):
    """Percentiles over the rounds."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Measurement:
    """A provider's figures in a setting; None if one does not apply, such as a loader's bytes."""

    provider: str
    case: str
    direction: str
    precision: str
    layout: str
    batch_size: int
    ms: Spread
    images_per_s: float
    speedup: Spread
    mbytes: float | None
    gflop: float | None
    gb_per_s: float | None
    of_floor: float | None
    peak_mb: float | None
    origin: Origin

    @property
    def setting(self) -> tuple[str, str, str, str, int]:
        return self.case, self.direction, self.precision, self.layout, self.batch_size

    @property
    def tflop_per_s(self) -> float | None:
        return self.gflop / self.ms.p50 if self.gflop else None


class MeasuredLimits(NamedTuple):
    """The device's roofs as last measured: GB/s, and TFLOP/s by precision."""

    copy: float
    matrix: dict[str, float]
    origin: Origin


class Part(NamedTuple):
    """The time of a category in a profiled step."""

    precision: str
    batch_size: str
    provider: str
    category: str
    ms: float


@dataclass(frozen=True)
class Folder:
    """The content of one device's folder.

    Args:
        path: path of the folder.
        rows: rows by level, for levels that have some; a setting's providers follow one another, the baseline first.
        limits: limits of the device; None without limits.csv.
        parts: parts of the profile; none without profile.csv.
        profiled_on: profile.csv's description of its machine, or "".
        digests: hashes of the files that were read, by name.
    """

    path: Path
    rows: Mapping[str, Sequence[Measurement]]
    limits: MeasuredLimits | None
    parts: Sequence[Part]
    profiled_on: str
    digests: Mapping[str, str]

    @cached_property
    def origins(self) -> list[Origin]:
        """The rows' origins, the oldest first."""
        return sorted({row.origin for rows in self.rows.values() for row in rows})

    @property
    def title(self) -> str:
        newest = self.origins[-1] if self.origins else None
        if newest is None:
            return self.path.name
        return newest.device if newest.driver else f"{newest.device}, {newest.cpu_threads} threads"

    @property
    def caption(self) -> str:
        """The second line of a picture's title."""
        origins = self.origins
        if len(origins) == 1:
            return f"{self.title}, commit {origins[0].commit}, {origins[0].day}"
        return f"{self.title}, measured at different times, see report.md" if origins else self.title


def read_folders(results: Path) -> list[Folder]:
    """Return the folders that hold at least one CSV file of a level, the limits or the profile, sorted by name.

    Raises:
        ValueError: a file lacks columns, has a row twice, or has a value that is not a number; or no folder is left.
    """
    paths = sorted(path for path in results.iterdir() if path.is_dir())
    folders = [folder for folder in map(read_folder, paths) if folder.digests]
    if not folders:
        raise ValueError(f"{results} must hold a folder with one of {', '.join(f'{name}.csv' for name in LEVELS)}")
    return folders


def read_folder(path: Path) -> Folder:
    texts = {}
    for name in (*LEVELS, LIMITS, PROFILE):
        file = path / f"{name}.csv"
        if file.exists():
            try:
                texts[name] = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{place(file)} must be UTF-8: {error}") from None
    tables = {name: _table(path / f"{name}.csv", text) for name, text in texts.items()}
    for name, table in tables.items():
        if not table:
            raise ValueError(f"{place(path / f'{name}.csv')} has no rows; remove it, or restore it")
    rows = {name: _rows(path / f"{name}.csv", LEVELS[name], tables[name]) for name in LEVELS if tables.get(name)}
    limits = _limits(path / f"{LIMITS}.csv", tables[LIMITS]) if tables.get(LIMITS) else None
    parts, profiled_on = _parts(path / f"{PROFILE}.csv", tables.get(PROFILE, []))
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return Folder(path, rows, limits, parts, profiled_on, digests)


def place(path: Path) -> str:
    """Return the names of the folder and the file."""
    return f"{path.parent.name}/{path.name}"


def _table(path: Path, text: str) -> list[dict[str, str]]:
    """Return the file's rows; values missing at the end of a row are empty."""
    return list(csv.DictReader(io.StringIO(text), restval=""))


def _need(path: Path, row: Mapping[str, str], columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in row]
    if missing:
        raise ValueError(f"{place(path)} lacks the columns {', '.join(missing)}")


def _number(path: Path, line: int, row: Mapping[str, str], column: str) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{place(path)}, row {line}: {column} must be a number of at least 0, got {row[column]!r}")
    return value


def _rows(path: Path, level: Level, table: Sequence[dict[str, str]]) -> list[Measurement]:
    _need(path, table[0], (*COLUMNS, *MACHINE))
    rows_by_key: dict[tuple[str, ...], Measurement] = {}
    for line, row in enumerate(table, 1):
        for column in (*COLUMNS, *MACHINE):
            if not row[column] and column not in MAY_BE_EMPTY:
                raise ValueError(f"{place(path)}, row {line}: {column} must not be empty")
        key = tuple(row[name] for name in KEY)
        if key in rows_by_key:
            raise ValueError(f"{place(path)}, row {line}: a second row of {', '.join(key)}")
        rows_by_key[key] = _row(path, line, row)
    # In the file's order, except that a provider that was measured later is moved to its setting.
    settings = {setting: i for i, setting in enumerate(dict.fromkeys(row.setting for row in rows_by_key.values()))}
    names = dict.fromkeys((*level.providers, *(row.provider for row in rows_by_key.values())))
    providers = {name: i for i, name in enumerate(names)}
    return sorted(rows_by_key.values(), key=lambda row: (settings[row.setting], providers[row.provider]))


def _row(path: Path, line: int, row: Mapping[str, str]) -> Measurement:
    def number(column: str) -> float:
        return _number(path, line, row, column)

    def positive(column: str) -> float:
        if not (value := number(column)):
            raise ValueError(f"{place(path)}, row {line}: {column} must be above 0, got {row[column]!r}")
        return value

    def number_or_none(column: str) -> float | None:
        return number(column) if row[column] else None

    return Measurement(
        provider=row["provider"],
        case=row["case"],
        direction=row["direction"],
        precision=row["precision"],
        layout=row["layout"],
        batch_size=int(positive("batch_size")),
        ms=Spread(positive("p20_ms"), positive("p50_ms"), positive("p80_ms")),
        images_per_s=number("images_per_s"),
        speedup=Spread(positive("speedup_p20"), positive("speedup_p50"), positive("speedup_p80")),
        mbytes=number_or_none("mbytes"),
        gflop=number_or_none("gflop"),
        gb_per_s=number_or_none("gb_per_s"),
        of_floor=number_or_none("of_floor"),
        peak_mb=number_or_none("peak_mb"),
        origin=_origin(row),
    )


def _origin(row: Mapping[str, str]) -> Origin:
    return Origin(row["date_utc"][:10], row["commit"], *(row[name] for name in MACHINE[:6]))


def _limits(path: Path, table: Sequence[dict[str, str]]) -> MeasuredLimits:
    row, line, end = table[-1], len(table), "_tflop_per_s"
    _need(path, row, ("copy_gb_per_s", *MACHINE))
    rates = [name for name in row if name.endswith(end) and row[name]]  # empty for an emulated precision
    matrix = {name.removesuffix(end): _number(path, line, row, name) for name in rates}
    return MeasuredLimits(_number(path, line, row, "copy_gb_per_s"), matrix, _origin(row))


def _parts(path: Path, table: Sequence[dict[str, str]]) -> tuple[list[Part], str]:
    """Return the sums by category, and the file's description of its machine."""
    if not table:
        return [], ""
    _need(path, table[0], ("provider", "category", "ms_per_step", "precision", "batch_size"))
    sums: dict[tuple[str, str, str, str], float] = {}
    for line, row in enumerate(table, 1):
        key = (row["precision"], row["batch_size"], row["provider"], row["category"])
        sums[key] = sums.get(key, 0.0) + _number(path, line, row, "ms_per_step")
    about = {"device": "", "torch": "torch ", "triton": "triton ", "date_utc": ""}
    said = [f"{word}{table[0][name]}" for name, word in about.items() if table[0].get(name)]
    return [Part(*key, total) for key, total in sums.items()], ", ".join(said)
