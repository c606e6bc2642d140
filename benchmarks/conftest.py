"""Turns the settings and providers of bench_*.py into tests, measures each setting once, and writes the results."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.correctness import refuse_interpreter
from benchmarks.limits import Limits, measure_limits
from benchmarks.replay import CLOCK
from benchmarks.results import RESULTS, ROOT, device_slug, machine_columns, replace_rows
from resnet_fast.common.machine import device_name
from resnet_fast.training.config import choose_device

QUICK_RESULTS = ROOT / ".benchmarks/results"  # ignored by git
MEASURED = pytest.StashKey[dict]()
WRITTEN = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fast")
    group.addoption("--quick", action="store_true", help="few settings and rounds, no long compilation")
    group.addoption("--rounds", type=int, help="timed runs of each provider, instead of the level's own number")
    group.addoption("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.addoption(
        "--results",
        type=Path,
        help="folder of the results, default benchmarks/results; with --quick or --rounds .benchmarks/results",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads it
def pytest_configure(config: pytest.Config) -> None:
    if config.option.benchmark_columns is None:
        config.option.benchmark_columns = ["min", "median", "max", "rounds"]  # 80 columns hold no more
    config.stash[MEASURED], config.stash[WRITTEN] = {}, {}
    options = config.option
    try:
        choose_device(options.device)
        refuse_interpreter()
    except (ValueError, RuntimeError) as error:
        raise pytest.UsageError(str(error)) from None
    if options.rounds is not None and options.rounds < 1:
        raise pytest.UsageError(f"--rounds must be at least 1, got {options.rounds}")
    if getattr(options, "numprocesses", None):
        raise pytest.UsageError("benchmarks run in one process, which has the machine to itself; leave -n out")
    if options.results is None:  # the rows of a full run are not replaced by those of a short one
        options.results = QUICK_RESULTS if options.quick or options.rounds else RESULTS
    if options.results.exists() and not options.results.is_dir():
        raise pytest.UsageError(f"--results must be a folder, {options.results} is a file")


def pytest_report_header(config: pytest.Config) -> str:
    device = choose_device(config.option.device)
    return f"device: {device_name(device)} ({device}), torch {torch.__version__}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    level: harness.Level = vars(metafunc.module)["LEVEL"]
    device = choose_device(metafunc.config.option.device)
    # The providers of a setting one after the other: the first of them has all of them measured.
    cases = [
        pytest.param(setting, provider, id=f"{setting}-{provider}".replace(", ", "-"))
        for setting in level.settings(device, metafunc.config.option.quick)
        for provider in level.providers_of(setting)
    ]
    metafunc.parametrize(("setting", "provider"), cases)


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark, setting: harness.Setting, provider: str) -> Callable[[], None]:
    """Hands the times of this test's provider to pytest-benchmark; raises what was wrong with it."""
    level, device = request.module.LEVEL, choose_device(request.config.option.device)
    reason = level.why_not(provider, setting, device, request.config.option.quick)

    def hand_over() -> None:
        if reason is not None:
            pytest.skip(f"{provider}: {reason}")
        measured = _measured(request, level, setting, device)
        error = measured.refused.get(provider)
        if isinstance(error, torch.OutOfMemoryError):
            pytest.skip(f"{provider}: does not fit in the memory of {device}")
        if error is not None:
            raise error
        benchmark.group, benchmark.name = f"{level.name}: {setting}", provider
        CLOCK.replay(benchmark, measured.times[provider])

    return hand_over


def _measured(
    request: pytest.FixtureRequest, level: harness.Level, setting: harness.Setting, device: torch.device
) -> harness.Measured:
    """Measure all providers of the setting that are selected, once, and write their rows."""
    done, key, options = request.config.stash[MEASURED], (level.name, setting), request.config.option
    if key not in done:
        selected: list[dict[str, Any]] = [
            item.callspec.params
            for item in request.session.items
            if isinstance(item, pytest.Function) and item.module is request.module
        ]
        names = [params["provider"] for params in selected if params["setting"] == setting]
        names = [name for name in names if level.why_not(name, setting, device, options.quick) is None]
        rounds = options.rounds or (level.quick_rounds if options.quick else level.rounds)[device.type]
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # torch refuses "cuda" without a number here
        limits = _limits(device, options.results)
        done[key] = harness.measure(level, setting, device, names, rounds)
        rows = harness.rows(level, setting, done[key], limits, machine_columns(device))
        if rows:
            path = options.results / device_slug(device) / f"{level.name}.csv"
            replace_rows(path, rows, harness.SETTING)
            request.config.stash[WRITTEN].setdefault(path, []).append((setting, rows))
    return done[key]


@lru_cache(maxsize=1)
def _limits(device: torch.device, results: Path) -> Limits:
    """Measured when the first setting is, and written beside its rows."""
    limits = measure_limits(device)
    row = {"copy_gb_per_s": f"{limits.copy / 1e9:.2f}"}
    row |= {f"{precision}_tflop_per_s": f"{rate / 1e12:.4f}" for precision, rate in limits.matrix.items()}
    replace_rows(results / device_slug(device) / "limits.csv", [row | machine_columns(device)], ["device"])
    return limits


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """What pytest-benchmark's tables do not say: speed-up, TFLOP/s, and how near to the floor."""
    for path, measured in config.stash[WRITTEN].items():
        terminalreporter.section(f"{path.parent.name}/{path.name}")
        width = 2 + max(23, *(len(row["provider"]) for _, rows in measured for row in rows))
        columns = ("p20 ms", "p50 ms", "p80 ms", "speed-up", "TFLOP/s", "of floor")
        terminalreporter.write_line(" " * width + "".join(f"{column:>10}" for column in columns))
        for setting, rows in measured:
            terminalreporter.write_line(str(setting))
            for row in rows:
                figures = [f"{float(row[name]):.3f}" for name in ("p20_ms", "p50_ms", "p80_ms")]
                figures.append(f"{float(row['speedup_p50']):.2f}x")
                rate = float(row["gflop"] or 0) / float(row["p50_ms"])
                figures.append(f"{rate:.3g}" if rate else "")
                figures.append(f"{float(row['of_floor']):.1%}" if row["of_floor"] else "")
                name = f"  {row['provider']}"
                terminalreporter.write_line(f"{name:{width}}" + "".join(f"{figure:>10}" for figure in figures))
