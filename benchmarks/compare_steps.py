"""`python -m benchmarks.compare_steps`: the training step of eager and fused, alternating in one process.

Prints a table for each precision and batch size, and writes benchmarks/results/<device>/training_step.csv.
Exit codes: 0 done, 1 a provider is wrong or kernels are interpreted, 2 a wrong argument.
"""

import math
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.results import RESULTS, device_name, device_slug, machine_columns, read_rows, replace_rows
from benchmarks.timing import ROUNDS, WARM_UP, alternate, percentiles
from benchmarks.training_step import (
    BATCH_SIZES,
    PRECISIONS,
    PROVIDERS,
    Setting,
    TrainingStep,
    checked_steps,
    refuse_interpreter,
)
from resnet_fast.training.config import choose_device

KEY = ("provider", "precision", "batch_size")  # and the device, which names the folder
TIMES = ("p20_ms", "p50_ms", "p80_ms", "images_per_s", "ratio_p20", "ratio_p50", "ratio_p80")
COLUMNS = (*KEY, "rounds", *TIMES)  # and those of the machine
Row = dict[str, str]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def compare(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[
        list[str] | None, typer.Option(metavar="|".join(PRECISIONS), help="May be repeated. [default: all]")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=2, help="May be repeated. [default: cpu 32; cuda 128 and 512]")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help=f"Timed steps of each. [default: {ROUNDS['cpu']}; cuda {ROUNDS['cuda']}]")
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder of the results.", show_default="benchmarks/results")] = RESULTS,
) -> None:
    """Time the training step of eager PyTorch and of resnet_fast, alternating."""
    try:
        where = choose_device(device)
        settings = [
            Setting(where, name, size)
            for name in dict.fromkeys(precision or PRECISIONS)
            for size in dict.fromkeys(batch_size or BATCH_SIZES[where.type])
        ]
    except ValueError as error:
        _stop(2, error)
    rounds = rounds or ROUNDS[where.type]
    path = results / device_slug(where) / "training_step.csv"
    console = Console()
    console.print(f"ResNet-18, 3x3 stem, 10 classes, 32x32, on {device_name(where)}, {rounds} rounds", highlight=False)
    try:
        for setting in settings:
            rows = measure(setting, rounds, path)
            console.print(_table(setting, rows))
    except (RuntimeError, ValueError, OSError) as error:
        _stop(1, error)
    console.print(f"{path.parent.name}/{path.name} holds these rows", highlight=False)


def measure(setting: Setting, rounds: int, path: Path) -> list[Row]:
    """Check and time all providers in one setting and put their rows into the file.

    Raises:
        WrongProviderError: a provider is wrong; nothing was timed or written.
        RuntimeError: kernels are interpreted, or a loss became infinite or NaN.
        ValueError: the file has other columns.
    """
    machine = machine_columns(setting.device)
    read_rows(path, [*COLUMNS, *machine])  # a file that does not fit costs no time
    refuse_interpreter()
    steps = checked_steps(setting, PROVIDERS)
    times = alternate(steps, setting.device, rounds, WARM_UP[setting.device.type])
    _check_losses(steps)
    baseline = next(iter(times.values()))
    rows = [_row(name, setting, rounds, times[name], baseline, machine) for name in times]
    replace_rows(path, rows, KEY)
    return rows


def _check_losses(steps: dict[str, TrainingStep]) -> None:
    for name, step in steps.items():
        loss = step().item()
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of {name} became {loss}: what was timed is no training step")


def _row(
    name: str, setting: Setting, rounds: int, times: list[float], baseline: list[float], machine: dict[str, str]
) -> Row:
    """One row of the file; the ratio is taken round by round, where both ran on the machine in the same state."""
    p20, p50, p80 = percentiles(times)
    ratios = percentiles([ours / theirs for ours, theirs in zip(times, baseline, strict=True)])
    values = [f"{ms:.3f}" for ms in (p20, p50, p80)] + [f"{1e3 * setting.batch_size / p50:.1f}"]
    values += [f"{ratio:.4f}" for ratio in ratios]
    own = (name, setting.precision, str(setting.batch_size), str(rounds), *values)
    return dict(zip(COLUMNS, own, strict=True)) | machine


def _table(setting: Setting, rows: list[Row]) -> Table:
    table = Table(title=str(setting), title_justify="left")
    table.add_column("provider")
    for heading in ("p20 ms", "p50 ms", "p80 ms", "ratio (p20-p80)", "images/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        is_baseline = row is rows[0]
        ratio = "1" if is_baseline else f"{row['ratio_p50']} ({row['ratio_p20']}-{row['ratio_p80']})"
        table.add_row(row["provider"], row["p20_ms"], row["p50_ms"], row["p80_ms"], ratio, row["images_per_s"])
    return table


def _stop(code: int, error: Exception) -> NoReturn:
    typer.echo(f"compare_steps: error: {error}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.compare_steps")
