"""Turns the settings and providers of bench_*.py into tests, measures each setting once, and writes the results."""

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.budget import QUICK_SECONDS, Budget, elapsed
from benchmarks.limits import PRECISIONS, Limits, measure_limits, quick_precision
from benchmarks.measured import LEVELS
from benchmarks.replay import CLOCK
from benchmarks.results import RESULTS, ROOT, device_slug, machine_columns, replace_rows
from resnet_fast.common.machine import device_name
from resnet_fast.profiling.check import refuse_interpreter
from resnet_fast.training.config import choose_device

QUICK_RESULTS = ROOT / ".benchmarks/results"  # ignored by git
Key = tuple[str, harness.Setting]  # the level's name
SELECTED = pytest.StashKey[dict[Key, list[str]]]()  # providers that can be timed, in the order of measurement
CANNOT = pytest.StashKey[dict[tuple[str, str], set[str]]]()  # by level and reason, the providers that cannot be timed
MEASURED = pytest.StashKey[dict[Key, harness.Measured | None]]()  # None: no time was left
WRITTEN = pytest.StashKey[dict]()
BUDGET = pytest.StashKey[Budget | None]()
SILENCE = 10.0  # seconds without output after which a line names the running provider


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fast")
    group.addoption("--quick", action="store_true", help="few settings and rounds, at most 3 minutes")
    group.addoption("--rounds", type=int, help="timed runs of each provider, instead of the level's default")
    group.addoption("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.addoption(
        "--results",
        type=Path,
        help="folder of the results (default: benchmarks/results, with --quick or --rounds .benchmarks/results)",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads it
def pytest_configure(config: pytest.Config) -> None:
    if config.option.benchmark_columns is None:
        config.option.benchmark_columns = ["min", "median", "max", "rounds"]  # 80 columns hold no more
    options = config.option
    config.stash[SELECTED], config.stash[CANNOT], config.stash[MEASURED], config.stash[WRITTEN] = {}, {}, {}, {}
    # With an explicit number of rounds the time is not limited.
    config.stash[BUDGET] = Budget(QUICK_SECONDS) if options.quick and options.rounds is None else None
    try:
        choose_device(options.device)
        refuse_interpreter()
    except (ValueError, RuntimeError) as error:
        raise pytest.UsageError(str(error)) from None
    if options.rounds is not None and options.rounds < 1:
        raise pytest.UsageError(f"--rounds must be at least 1, got {options.rounds}")
    if getattr(options, "numprocesses", None):
        raise pytest.UsageError("benchmarks run in one process, which needs the machine to itself; omit -n")
    if options.results is None:  # a short run must not replace a full run's rows
        options.results = QUICK_RESULTS if options.quick or options.rounds else RESULTS
    if options.results.exists() and not options.results.is_dir():
        raise pytest.UsageError(f"--results must be a folder, got the file {options.results}")


def pytest_report_header(config: pytest.Config) -> str:
    device = choose_device(config.option.device)
    line = f"device: {device_name(device)} ({device}), torch {torch.__version__}"
    if config.option.quick and (precision := quick_precision(device)) != "bf16":
        line += f"; {precision}, because this processor only emulates bf16"
    return line


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    level: harness.Level | None = vars(metafunc.module).get("LEVEL")
    if level is None:
        return
    device = choose_device(metafunc.config.option.device)
    # A setting's providers follow one another, because the first of them triggers the measurement of all.
    cases = [
        pytest.param(setting, provider, id=f"{setting}-{provider}".replace(", ", "-"))
        for setting in level.settings(device, metafunc.config.option.quick)
        for provider in level.providers_of(setting)
    ]
    metafunc.parametrize(("setting", "provider"), cases)


@pytest.hookimpl(trylast=True)  # after -k has deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what cannot be timed. A quick run alternates between the levels, so that each gets some settings."""
    device = choose_device(config.option.device)
    others = [item for item in items if not hasattr(getattr(item, "module", None), "LEVEL")]
    selected, cannot = [], []
    for item in items:
        if item in others:
            continue
        level, setting, provider = _case(item)
        reason = level.why_not(provider, setting, device, config.option.quick)
        if reason is None:
            config.stash[SELECTED].setdefault((level.name, setting), []).append(provider)
            selected.append(item)
        else:
            config.stash[CANNOT].setdefault((level.name, reason), set()).add(provider)
            cannot.append(item)
    if cannot:
        config.hook.pytest_deselected(items=cannot)
    if config.option.quick:
        # Heavy levels come first in a turn, and leave the time that they do not need to the light ones.
        turns: dict[Key, tuple[int, int]] = {}
        for place, name in enumerate(LEVELS):
            keys = [key for key in config.stash[SELECTED] if key[0] == name]
            turns |= {key: (turn, place) for turn, key in enumerate(keys)}
        selected.sort(key=lambda item: turns[_case(item)[0].name, _case(item)[1]])
    items[:] = [*others, *selected]


def _case(item: pytest.Item) -> tuple[harness.Level, harness.Setting, str]:
    assert isinstance(item, pytest.Function)
    params: dict[str, Any] = item.callspec.params
    return vars(item.module)["LEVEL"], params["setting"], params["provider"]


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark, setting: harness.Setting, provider: str) -> Callable[[], None]:
    """Return a function that passes this provider's times to pytest-benchmark, or raises the provider's error."""
    level, device = request.module.LEVEL, choose_device(request.config.option.device)

    def hand_over() -> None:
        measured = _measured(request.config, level, setting, device)
        if measured is None:
            pytest.skip(f"no time left of the {QUICK_SECONDS:.0f} s of --quick")
        error = measured.refused.get(provider)
        if isinstance(error, harness.OutOfTimeError):
            pytest.skip(f"no time: it {error}")
        if isinstance(error, torch.OutOfMemoryError):
            pytest.skip(f"{provider}: does not fit in the memory of {device}")
        if error is not None:
            raise error
        benchmark.group, benchmark.name = f"{level.name}: {setting}", provider
        CLOCK.replay(benchmark, measured.times[provider])

    return hand_over


def _measured(
    config: pytest.Config, level: harness.Level, setting: harness.Setting, device: torch.device
) -> harness.Measured | None:
    """Measure all selected providers of the setting once, and write their rows."""
    done, key = config.stash[MEASURED], (level.name, setting)
    if key not in done:
        done[key] = _measure(config, level, setting, device)
    return done[key]


def _measure(
    config: pytest.Config, level: harness.Level, setting: harness.Setting, device: torch.device
) -> harness.Measured | None:
    options, selected, budget = config.option, config.stash[SELECTED], config.stash[BUDGET]
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # torch refuses "cuda" without a number here
    progress = _Progress(config)
    if not config.stash[MEASURED]:
        progress.line("limits of the machine: a copy and a matrix product")
    limits = _limits(device, options.results)
    n_done = len(config.stash[MEASURED])
    seconds = budget.share(level.name) if budget else None
    if budget and seconds is None:
        return None
    progress.line(f"{n_done + 1} of {len(selected)}: {level.name}: {setting}")
    rounds = options.rounds or (level.quick_rounds if options.quick else level.rounds)[device.type]
    begin = time.perf_counter()
    measured = harness.measure(
        level, setting, device, selected[level.name, setting], rounds, seconds, progress.line_after_silence
    )
    if budget:
        extra_ms = sum(sum(times[harness.MIN_ROUNDS :]) for times in measured.times.values())
        budget.note(level.name, time.perf_counter() - begin - extra_ms / 1e3)
    rows = harness.rows(level, setting, measured, limits, machine_columns(device))
    if rows:
        path = options.results / device_slug(device) / f"{level.name}.csv"
        replace_rows(path, rows, harness.SETTING)
        config.stash[WRITTEN].setdefault(path, []).append((setting, rows))
    return measured


class _Progress:
    """Prints what runs, without pytest's capture and without buffering."""

    def __init__(self, config: pytest.Config) -> None:
        self.reporter: Any = config.pluginmanager.getplugin("terminalreporter")
        self.capture: Any = config.pluginmanager.getplugin("capturemanager")
        self.spoken = elapsed()

    def line(self, text: str) -> None:
        with self.capture.global_and_fixture_disabled():
            self.reporter.ensure_newline()
            self.reporter.write(f"[{elapsed():.0f} s] {text}\n", flush=True)
        self.spoken = elapsed()

    def line_after_silence(self, text: str) -> None:
        if elapsed() - self.spoken > SILENCE:
            self.line(text)


@lru_cache(maxsize=1)
def _limits(device: torch.device, results: Path) -> Limits:
    """Measure the machine's limits once, with the first setting, and write them next to its rows."""
    limits = measure_limits(device)
    row = {"copy_gb_per_s": f"{limits.copy / 1e9:.2f}"}
    for precision in PRECISIONS[device.type]:
        rate = limits.matrix.get(precision)
        row[f"{precision}_tflop_per_s"] = "" if rate is None else f"{rate / 1e12:.4f}"
    replace_rows(results / device_slug(device) / "limits.csv", [row | machine_columns(device)], ["device"])
    return limits


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Print what pytest-benchmark's tables lack: speed-up, TFLOP/s, share of the floor, and what is left out."""
    for path, measured in config.stash[WRITTEN].items():
        terminalreporter.section(f"{path.parent.name}/{path.name}")
        width = 2 + max(23, *(len(row["provider"]) for _, rows in measured for row in rows))
        columns = ("rounds", "p20 ms", "p50 ms", "p80 ms", "speed-up", "TFLOP/s", "of floor")
        terminalreporter.write_line(" " * width + "".join(f"{column:>10}" for column in columns))
        for setting, rows in measured:
            terminalreporter.write_line(str(setting))
            for row in rows:
                figures = [row["rounds"], *(f"{float(row[name]):.3f}" for name in ("p20_ms", "p50_ms", "p80_ms"))]
                figures.append(f"{float(row['speedup_p50']):.2f}x")
                rate = float(row["gflop"] or 0) / float(row["p50_ms"])
                figures.append(f"{rate:.3g}" if rate else "")
                figures.append(f"{float(row['of_floor']):.1%}" if row["of_floor"] else "")
                name = f"  {row['provider']}"
                terminalreporter.write_line(f"{name:{width}}" + "".join(f"{figure:>10}" for figure in figures))
    left_out = [
        f"{level}, {setting}: no time within the {QUICK_SECONDS:.0f} s of --quick"
        for (level, setting), timing in config.stash[MEASURED].items()
        if timing is None or any(isinstance(error, harness.OutOfTimeError) for error in timing.refused.values())
    ]
    for (level, reason), providers in config.stash[CANNOT].items():
        names = [f'"{name}"' for name in LEVELS[level].providers if name in providers]
        is_whole = all(name != level for name, _ in config.stash[SELECTED])
        left_out.append(f"{level}{'' if is_whole else ', ' + ', '.join(names)}: {reason}")
    if left_out:
        terminalreporter.section("left out")
        for line in left_out:
            terminalreporter.write_line(line)
