"""`python -m benchmarks.predict` predicts the kernels' times on GPUs from their machine code, without a GPU.

Writes benchmarks/predicted/<gpu>.csv, a row per kernel, shape, precision and batch size, and steps.csv, a row per
training step: fused, and eager and torch.compile where `python -m benchmarks.speed_model.peers` has predicted them.
Exit codes: 0 done, 1 with --check a kernel is slower than its row or has none, 2 a wrong argument.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.results import read_csv, replace_rows
from benchmarks.speed_model.gpus import GPUS, GpuName
from benchmarks.work import STAGES

if TYPE_CHECKING:
    from benchmarks.speed_model.network import Job

PREDICTED = Path(__file__).resolve().parent / "predicted"
TOLERANCE = 1.03  # largest accepted ratio of a kernel's time to its row's

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Precision(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


ALL_GPUS, ALL_PRECISIONS, BATCH_SIZES = list(GpuName), list(Precision), [128, 512]


@app.command()
def main(
    gpu: Annotated[list[GpuName], typer.Option(help="GPU; may be given several times.")] = ALL_GPUS,
    batch_size: Annotated[list[int], typer.Option(min=1, help="Images; may be given several times.")] = BATCH_SIZES,
    dtype: Annotated[list[Precision], typer.Option(help="Precision; may be given several times.")] = ALL_PRECISIONS,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Write nothing; exit with 1 if a changed kernel of 64 channels is more than 3 % slower than its row, "
            "or a kernel has no row.",
        ),
    ] = False,
) -> None:
    """Predict the kernels of a training step of ResNet-18 (3x3 stem, 32x32) from their machine code.

    Writes benchmarks/predicted/<gpu>.csv and steps.csv. A GPU, precision and batch size take about 15 seconds.
    """
    chosen = dict.fromkeys(itertools.product([choice.value for choice in gpu], [choice.value for choice in dtype]))
    settings = [(name, precision) for name, precision in chosen if precision != "bf16" or GPUS[name].has_bf16]
    if without := [name for name, precision in chosen if (name, precision) not in settings]:
        message = f"{', '.join(without)}: GPUs before compute capability 8.0 have no bf16"
        if not settings:
            raise typer.BadParameter(message, param_hint="'--dtype'")
        typer.echo(f"left out: {message}", err=True)
    os.environ["TRITON_INTERPRET"] = "0"  # before a kernel is imported
    from benchmarks.speed_model import network, peers

    slow = []
    for name, precision in settings:
        jobs = [job for size in batch_size for job in network.jobs(name, precision, size)]
        path = PREDICTED / f"{name}.csv"
        if check:
            messages = list(slower(path, jobs, network.KERNEL_KEY))
            n_kernels = len({job.key for job in jobs})
            typer.echo(
                f"{name}, {precision}: {len(messages)} of {n_kernels} kernels are slower than their rows, or have none"
            )
            slow += messages
            continue
        rows = network.predict_all(jobs)
        replace_rows(path, rows, ("precision", "batch_size"))
        for size in batch_size:
            own = [row for row in rows if row["batch_size"] == str(size)]
            steps = [network.fused_step_row(name, precision, size, own)]
            for provider, totals in peers.read_totals(name, precision, size).items():
                kernels = (totals.launches, totals.predicted_us)
                steps.append(network.step_row(name, precision, size, provider, *kernels))
            replace_rows(PREDICTED / "steps.csv", steps, network.STEP_KEY)
            for step in steps:
                typer.echo(
                    f"predicted: {name}, {precision}, batch {size}, {step['provider']}: {step['launches']} launches, "
                    f"{step['batch_norm_us']} us, step {step['step_ms']} ms"
                )
    if slow:
        typer.echo("\n".join(slow))
        raise typer.Exit(1)


def slower(path: Path, jobs: "Sequence[Job]", key: tuple[str, ...]) -> Iterator[str]:
    """Yield a message for each kernel that is slower than its row, or has none.

    A kernel with an unchanged key needs no prediction; one is predicted to verify that. Of the changed kernels, only
    those of the first stage, which has the largest tensors, are predicted.
    """
    rows = {tuple(row[column] for column in key): row for row in read_csv(path)}
    unchanged = 0
    for job in {job.key: job for job in jobs}.values():
        row = rows.get(tuple(job.name.values()))
        kernel = ", ".join(f"{column} {value}" for column, value in job.name.items())
        if row is None:
            yield f"{path.name} has no row for {kernel}"
            continue
        unchanged += row["key"] == job.key
        if unchanged != 1 if row["key"] == job.key else (job.n_channels, job.width) != STAGES[0]:
            continue
        predicted = job.predict()["predicted_us"]
        if float(predicted) > TOLERANCE * float(row["predicted_us"]):
            yield f"{path.name} has {row['predicted_us']} us for {kernel}: {predicted} us now"


if __name__ == "__main__":
    app()
