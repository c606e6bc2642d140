"""Run a level of benchmarks: build its providers, check them, time them alternately, and make rows of a CSV file.

A level (op, convolution, block, training step, inference, loader) defines settings, providers and exact results.
"""

import gc
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.correctness import Tolerance, check, errors
from benchmarks.limits import Limits
from benchmarks.work import Work
from resnet_fast.ops import choices, implementations
from resnet_fast.profiling.check import refuse_interpreter
from resnet_fast.tuning.timing import alternate, percentiles

SETTING = ("case", "direction", "precision", "layout", "batch_size")  # and the device, which names the folder
KEY = ("provider", *SETTING)
TIMES = ("rounds", "p20_ms", "p50_ms", "p80_ms", "images_per_s", "speedup_p20", "speedup_p50", "speedup_p80")
ROOF = ("mbytes", "gflop", "gb_per_s", "floor_ms", "of_floor", "peak_mb")
COLUMNS = (*KEY, *TIMES, *ROOF)  # and those of the machine
Row = dict[str, str]
MIN_ROUNDS = 3  # the fewest for which a median means something


class OutOfTimeError(RuntimeError):
    """A setting takes more than twice its time, so it is not timed."""


@dataclass(frozen=True)
class Setting:
    """A setting in which all providers are compared.

    Args:
        case: the operation or network, with its shape.
        direction: "forward", "backward" or "both"; "step" for a training step, "epoch" for a loader, one of
            bench_conv.DIRECTIONS for a convolution.
        precision: "fp32", "bf16" or "fp16"; for a network, autocast with fp32 weights.
        layout: "channels_last" or "NCHW".
        batch_size: number of images.
        shape: sizes of the case, as its level needs them.
    """

    case: str
    direction: str
    precision: str
    layout: str
    batch_size: int
    shape: tuple = field(default=(), repr=False)

    @property
    def item_size(self) -> int:
        """Bytes per element of an activation."""
        return 4 if self.precision == "fp32" else 2

    def __str__(self) -> str:
        return f"{self.case}, {self.direction}, {self.precision}, {self.layout}, batch {self.batch_size}"


class Run(ABC):
    """A provider built for a setting; a call runs it once, on the next inputs."""

    @abstractmethod
    def __call__(self) -> object: ...

    @abstractmethod
    def observe(self) -> dict[str, Tensor]:
        """Run for the first time, on the inputs whose exact results are known; return the results by name."""

    def finish(self) -> None:  # noqa: B027
        """Raise RuntimeError if the timed runs did not do what they should."""


class Problem(NamedTuple):
    """The inputs of a setting, the exact results of the first inputs, and their tolerance."""

    data: Any
    exact: dict[str, Tensor]
    tolerance: Tolerance


class Provider(NamedTuple):
    """How to build an implementation.

    Args:
        build: makes a run from a setting and the level's data.
        why_not: returns why the provider cannot run in a setting on a device, or None.
        slow_on: device types on which it compiles too long for a quick run.
        has_peak: whether its peak memory can be measured; a replayed graph allocates nothing.
        entries: returns the entries of the table of choices to run with (resnet_fast/ops/choices.py). The default is
            none, whatever `resnet-fast tune` has written on this machine.
    """

    build: Callable[[Setting, Any], Run]
    why_not: Callable[[Setting, torch.device], str | None] = lambda setting, device: None
    slow_on: tuple[str, ...] = ()
    has_peak: bool = True
    entries: Callable[[Setting, torch.device], Mapping[implementations.Problem, implementations.Choice]] = (
        lambda setting, device: {}
    )


class Entries(Mapping[implementations.Problem, implementations.Choice]):
    """Entries of a table of choices that record whether any has been looked up."""

    def __init__(self, entries: Mapping[implementations.Problem, implementations.Choice]) -> None:
        self.entries, self.are_used = entries, False

    def __getitem__(self, problem: implementations.Problem) -> implementations.Choice:
        choice = self.entries[problem]
        self.are_used = True
        return choice

    def __iter__(self) -> Iterator[implementations.Problem]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Level(ABC):
    """A family of settings. The first provider is the baseline with which the others are compared."""

    name: str  # of the CSV file
    providers: Mapping[str, Provider]
    hide_launches: bool  # see timing.alternate
    rounds: Mapping[str, int]  # by device type
    quick_rounds: Mapping[str, int]
    warm_up: Mapping[str, int] = {"cpu": 2, "cuda": 20}  # rounds

    @abstractmethod
    def settings(self, device: torch.device, quick: bool) -> Iterable[Setting]: ...

    @abstractmethod
    def problem(self, setting: Setting, device: torch.device) -> Problem: ...

    @abstractmethod
    def work(self, setting: Setting) -> Work: ...

    def n_images(self, setting: Setting) -> int:
        """Return the number of images of a run."""
        return setting.batch_size

    def why_not(self, name: str, setting: Setting, device: torch.device, quick: bool) -> str | None:
        """Return why a provider cannot be timed, or None."""
        provider = self.providers[name]
        if quick and device.type in provider.slow_on:
            return "compiles too long for --quick"
        return provider.why_not(setting, device)

    def providers_of(self, setting: Setting) -> Iterable[str]:
        """Return the providers for the setting, on any device."""
        return self.providers

    @property
    def baseline(self) -> str:
        return next(iter(self.providers))


class Measured(NamedTuple):
    """Times in ms by provider, peak memory in bytes by provider (GPU), and why the others were not timed."""

    times: dict[str, list[float]]
    peaks: dict[str, int]
    refused: dict[str, Exception]


def measure(
    level: Level,
    setting: Setting,
    device: torch.device,
    names: Sequence[str],
    rounds: int,
    seconds: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Build and check the baseline and the named providers, and time them alternately.

    A provider that fails or is wrong is not timed; its error is in `refused`. If the baseline fails, none is timed.

    Args:
        level, setting, device: what to measure, and where.
        names: names of the providers.
        rounds: timed runs of each provider.
        seconds: time limit, including the checks. Rounds are dropped to keep to it, down to `MIN_ROUNDS`; a setting
            that needs more than twice the limit is given up.
        say: is called with a message about what runs.

    Raises:
        ProfileError: kernels are interpreted.
    """
    refuse_interpreter()
    names = list(dict.fromkeys((level.baseline, *names)))
    torch._dynamo.reset()  # otherwise earlier settings count toward the limit of recompilations
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the previous setting's blocks may have other sizes
    try:
        # A backward that runs repeatedly must not overwrite what the forward has saved.
        with functorch_config.patch(donated_buffer=setting.direction != "backward"):
            return _measure(level, setting, device, names, rounds, seconds, say)
    except Exception as error:  # of the baseline, or one that concerns all, such as out of memory
        return Measured({}, {}, dict.fromkeys(names, _without_frames(error)))


def _measure(
    level: Level,
    setting: Setting,
    device: torch.device,
    names: Sequence[str],
    rounds: int,
    seconds: float | None,
    say: Callable[[str], None],
) -> Measured:
    begin = time.perf_counter()
    say("exact results in fp64")
    problem = level.problem(setting, device)
    calls, finishes, peaks, refused = {}, {}, {}, {}
    baseline_errors: dict[str, float] = {}
    for name in names:
        _check_time(begin, seconds)
        say(f"check {name}")
        try:
            gc.collect()
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            entries = Entries(level.providers[name].entries(setting, device))
            with choices.using(entries):
                run = level.providers[name].build(setting, problem.data)
                own = errors(run.observe(), problem.exact)
            baseline_errors = baseline_errors or own
            check(name, own, baseline_errors, problem.exact, problem.tolerance)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            call = partial(_with, entries, run)
            call()  # as it will be timed, so that failures occur here
            if device.type == "cuda" and level.providers[name].has_peak:
                peaks[name] = torch.cuda.max_memory_allocated(device) - before
            if entries and not entries.are_used:
                raise RuntimeError(f"{name} looks up none of its {len(entries)} entries in the table of choices")
            calls[name], finishes[name] = call, partial(_with, entries, run.finish)
        except Exception as error:  # a peer may fail in any way; its test reports it, and the others continue
            if name == level.baseline:
                raise
            refused[name] = _without_frames(error)
    warm_up, unhidden = level.warm_up[device.type], {}
    say(f"warm up and time {len(calls)} providers")
    if seconds is not None:
        _check_time(begin, seconds)
        before = time.perf_counter()
        alternate(calls, device, 1, 0, level.hide_launches, unhidden)
        round_seconds = time.perf_counter() - before
        _check_time(begin, seconds, MIN_ROUNDS * round_seconds)
        n_fit = int((seconds - (time.perf_counter() - begin)) / round_seconds)
        rounds = max(min(MIN_ROUNDS, rounds), min(rounds, n_fit))
        warm_up = max(0, min(warm_up - 1, n_fit - rounds))
    left = {name: call for name, call in calls.items() if name not in unhidden}
    times = alternate(left, device, rounds, warm_up, level.hide_launches, unhidden)
    for name, finish in finishes.items():
        try:
            if name in unhidden:
                raise unhidden[name]
            finish()
        except RuntimeError as error:
            if name == level.baseline:
                raise
            refused[name] = error
            times.pop(name, None)
    return Measured(times, peaks, refused)


def _check_time(begin: float, seconds: float | None, needed: float = 0.0) -> None:
    if seconds is not None and time.perf_counter() - begin + needed > 2 * seconds:
        raise OutOfTimeError(f"needs more than twice its {seconds:.0f} s")


def _with(entries: Entries, call: Callable[[], object]) -> None:
    with choices.using(entries):
        call()


def _without_frames(error: Exception) -> Exception:
    """Return the error with its traceback as a note, so that its frames do not keep the provider's memory."""
    error.add_note("".join(traceback.format_exception(error)))
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def rows(level: Level, setting: Setting, measured: Measured, limits: Limits, machine: Mapping[str, str]) -> list[Row]:
    """Return the CSV rows. Speed-ups are computed per round, in which both ran on the machine in the same state."""
    if not measured.times:
        return []
    work = level.work(setting)
    floor_ms = limits.floor_ms(work, setting.precision)
    baseline = measured.times[level.baseline]
    report_rows = []
    for name, times in measured.times.items():
        p20, p50, p80 = percentiles(times)
        key = (name, setting.case, setting.direction, setting.precision, setting.layout, str(setting.batch_size))
        row = dict.fromkeys(COLUMNS, "") | dict(zip(KEY, key, strict=True))
        row |= {"rounds": str(len(times)), "images_per_s": f"{1e3 * level.n_images(setting) / p50:.1f}"}
        row |= {"p20_ms": f"{p20:.4f}", "p50_ms": f"{p50:.4f}", "p80_ms": f"{p80:.4f}"}
        speedups = percentiles([theirs / own for own, theirs in zip(times, baseline, strict=True)])
        row |= zip(("speedup_p20", "speedup_p50", "speedup_p80"), (f"{s:.4f}" for s in speedups), strict=True)
        if work.bytes:
            row |= {"mbytes": f"{work.bytes / 1e6:.3f}", "gflop": f"{work.flops / 1e9:.3f}"}
            row |= {"gb_per_s": f"{work.bytes / p50 / 1e6:.2f}"}
        if work.bytes and floor_ms is not None:
            row |= {"floor_ms": f"{floor_ms:.4f}", "of_floor": f"{floor_ms / p50:.4f}"}
        if name in measured.peaks:
            row["peak_mb"] = f"{measured.peaks[name] / 1e6:.1f}"
        report_rows.append(row | dict(machine))
    return report_rows
