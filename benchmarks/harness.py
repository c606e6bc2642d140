"""How a level of benchmarks runs: its providers are built, checked, timed in turn, and become rows of a CSV file.

A level (op, block, training step, loader) says which settings there are, which providers, and what is right.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.correctness import Tolerance, check, errors, refuse_interpreter
from benchmarks.limits import Limits
from benchmarks.timing import alternate, percentiles
from benchmarks.work import Work

KEY = ("provider", "case", "direction", "precision", "layout", "batch_size")  # and the device, which names the folder
TIMES = ("rounds", "p20_ms", "p50_ms", "p80_ms", "images_per_s", "speedup_p20", "speedup_p50", "speedup_p80")
ROOF = ("mbytes", "gflop", "gb_per_s", "floor_ms", "of_floor", "peak_mb")
COLUMNS = (*KEY, *TIMES, *ROOF)  # and those of the machine
Row = dict[str, str]


@dataclass(frozen=True)
class Setting:
    """What all providers are given alike.

    Args:
        case: the operation or network, with its shape.
        direction: "forward", "backward" or "both"; for a training step "step".
        precision: "fp32", "bf16" or "fp16"; of a network, autocast with fp32 weights.
        layout: "channels_last" or "NCHW".
        batch_size: images.
        shape: what else the level needs to know of the case.
    """

    case: str
    direction: str
    precision: str
    layout: str
    batch_size: int
    shape: tuple = field(default=(), repr=False)

    def __str__(self) -> str:
        return f"{self.case}, {self.direction}, {self.precision}, {self.layout}, batch {self.batch_size}"


class Run(ABC):
    """A provider, built for a setting; a call runs it once on the next inputs."""

    @abstractmethod
    def __call__(self) -> object: ...

    @abstractmethod
    def observe(self) -> dict[str, Tensor]:
        """Run for the first time, on the inputs whose exact results are known; every result by its name."""

    def finish(self) -> None:  # noqa: B027
        """Raise RuntimeError where what was timed was not what it is taken for."""


class Problem(NamedTuple):
    """The inputs of a setting, the exact results of the first, and what `correctness.check` allows."""

    data: Any
    exact: dict[str, Tensor]
    tolerance: Tolerance


class Provider(NamedTuple):
    """How to build an implementation; why it cannot run in a setting on a device, or None; and the device types on
    which it compiles too long for a quick run.
    """

    build: Callable[[Setting, Any], Run]
    why_not: Callable[[Setting, torch.device], str | None] = lambda setting, device: None
    slow_on: tuple[str, ...] = ()


class Level(ABC):
    """A family of settings. The first provider is the baseline, with which the others are compared and checked."""

    name: str  # of the CSV file
    providers: Mapping[str, Provider]
    hide_launches: bool  # see timing.alternate
    rounds: Mapping[str, int]  # by device type
    quick_rounds: Mapping[str, int]

    @abstractmethod
    def settings(self, device: torch.device, quick: bool) -> Iterable[Setting]: ...

    @abstractmethod
    def problem(self, setting: Setting, device: torch.device) -> Problem: ...

    @abstractmethod
    def work(self, setting: Setting) -> Work: ...

    def n_images(self, setting: Setting) -> int:
        """Images of a run."""
        return setting.batch_size

    def why_not(self, name: str, setting: Setting, device: torch.device, quick: bool) -> str | None:
        """None where a provider can be timed, else the reason."""
        provider = self.providers[name]
        if quick and device.type in provider.slow_on:
            return "compiles too long for --quick"
        return provider.why_not(setting, device)

    @property
    def baseline(self) -> str:
        return next(iter(self.providers))


class Measured(NamedTuple):
    """Times in ms by provider, peak memory in bytes by provider (GPU), and why the others were not timed."""

    times: dict[str, list[float]]
    peaks: dict[str, int]
    refused: dict[str, Exception]


def measure(level: Level, setting: Setting, device: torch.device, names: Sequence[str], rounds: int) -> Measured:
    """Build, check and time the baseline and the named providers, alternating.

    A provider that fails, or is wrong, is not timed; its error is in `refused`. Without the baseline none is timed.

    Raises:
        RuntimeError: kernels are interpreted, or what was timed turned out not to be what it was taken for.
    """
    refuse_interpreter()
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # torch refuses "cuda" without a number here
        torch.cuda.empty_cache()  # of the setting before, whose blocks may be of other sizes
    torch._dynamo.reset()  # else the settings of before count as recompilations, of which there may be few
    problem = level.problem(setting, device)
    runs, peaks, refused = {}, {}, {}
    baseline_errors: dict[str, float] = {}
    for name in dict.fromkeys((level.baseline, *names)):
        try:
            begin = _start_of_peak(device)
            run = level.providers[name].build(setting, problem.data)
            own = errors(run.observe(), problem.exact)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(device) - begin
            baseline_errors = baseline_errors or own
            check(name, own, baseline_errors, problem.exact, problem.tolerance)
            run()  # as it will be timed, for what fails then to fail here
            runs[name] = run
        except Exception as error:  # a peer may fail in any way; its test reports it, and the others go on
            error = error.with_traceback(None)  # which would keep the provider's memory
            if name == level.baseline:
                return Measured({}, {}, {name: error for name in (level.baseline, *names)})
            refused[name] = error
    warm_up = {"cpu": 2, "cuda": 20}[device.type]
    times = alternate(runs, device, rounds, warm_up, level.hide_launches)
    for run in runs.values():
        run.finish()
    return Measured(times, peaks, refused)


def _start_of_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def rows(level: Level, setting: Setting, measured: Measured, limits: Limits, machine: Mapping[str, str]) -> list[Row]:
    """The rows of the file: speed-ups are taken round by round, where both ran on the machine in the same state."""
    if not measured.times:
        return []
    work = level.work(setting)
    floor_ms = limits.floor_ms(work, setting.precision)
    baseline = measured.times[level.baseline]
    found = []
    for name, times in measured.times.items():
        p20, p50, p80 = percentiles(times)
        speedups = percentiles([theirs / own for own, theirs in zip(times, baseline, strict=True)])
        key = (name, setting.case, setting.direction, setting.precision, setting.layout, str(setting.batch_size))
        of_time = [f"{ms:.4f}" for ms in (p20, p50, p80)] + [f"{1e3 * level.n_images(setting) / p50:.1f}"]
        of_time += [f"{speedup:.4f}" for speedup in speedups]
        roof = ["", "", "", "", ""]
        if work.bytes:
            roof = [f"{work.bytes / 1e6:.3f}", f"{work.flops / 1e9:.3f}", f"{work.bytes / p50 / 1e6:.2f}"]
            roof += [f"{floor_ms:.4f}", f"{floor_ms / p50:.4f}"]
        peak = f"{measured.peaks[name] / 1e6:.1f}" if name in measured.peaks else ""
        values = (*key, str(len(times)), *of_time, *roof, peak)
        found.append(dict(zip(COLUMNS, values, strict=True)) | dict(machine))
    return found
