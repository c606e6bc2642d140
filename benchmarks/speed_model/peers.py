"""`python -m benchmarks.speed_model.peers` predicts the kernels of eager and torch.compile in a training step.

Writes predicted/peers-<gpu>.csv, a row for each kernel, without a GPU. Capturing and predicting torch.compile's kernels
takes about three minutes for each GPU and batch size.
"""

import itertools
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.results import read_csv, replace_rows

from .eager import eager_rows
from .gpus import GPUS, GpuName
from .inductor import compile_rows, run_capture
from .rows import Row, Totals, add_up

PREDICTED = Path(__file__).resolve().parents[1] / "predicted"
H200 = GpuName("h200")


def peers_path(gpu: str) -> Path:
    return PREDICTED / f"peers-{gpu}.csv"


def precision_of(gpu: str) -> str:
    """Return the 16-bit type for training on the GPU: fp16 before sm_80, which emulates bf16."""
    return "bf16" if GPUS[gpu].has_bf16 else "fp16"


def predict_peers(gpu: str, batch_size: int) -> list[Row]:
    """Return the rows of eager and of torch.compile.

    Raises:
        RuntimeError: a requirement of the capture is missing (`inductor.run_capture`).
    """
    captured = run_capture("capture", gpu, batch_size, precision_of(gpu))
    return eager_rows(GPUS[gpu], batch_size) + compile_rows(captured, GPUS[gpu])


def write_peers(gpu: str, batch_size: int, rows: list[Row]) -> None:
    """Write the rows to the GPU's file, replacing those with the same batch size."""
    setting = {"batch_size": str(batch_size), "precision": precision_of(gpu)}
    texts = []
    for row in rows:
        numbers = {
            "launches": f"{row.launches}",
            "predicted_us": f"{row.predicted_us:.2f}",
            "bytes": f"{row.bytes:.0f}",
        }
        texts.append({**setting, **row._asdict(), **numbers})
    replace_rows(peers_path(gpu), texts, tuple(setting))


def read_totals(gpu: str, precision: str, batch_size: int) -> dict[str, Totals]:
    """Return the totals of eager and torch.compile from the GPU's file; none if the setting is not in it.

    They leave out convolutions, the linear layer, the loss and the optimizer, which are the same for all providers.
    """
    if not peers_path(gpu).exists():
        return {}
    rows: dict[str, list[Row]] = {}
    for text in read_csv(peers_path(gpu)):
        if (text["precision"], text["batch_size"]) == (precision, str(batch_size)):
            numbers = int(text["launches"]), float(text["predicted_us"]), float(text["bytes"])
            rows.setdefault(text["provider"], []).append(Row(text["provider"], text["group"], text["kernel"], *numbers))
    return {provider: add_up(own) for provider, own in rows.items()}


def main(
    gpu: Annotated[list[GpuName], typer.Option(help="GPU; may be given several times.")] = [H200],  # noqa: B006
    batch_size: Annotated[list[int], typer.Option(min=1, help="Images; may be given several times.")] = [128, 512],  # noqa: B006
) -> None:
    """Predict the kernels of eager and torch.compile in a training step of ResNet-18.

    Writes benchmarks/predicted/peers-<gpu>.csv.
    """
    for name, size in itertools.product(gpu, batch_size):
        write_peers(name, size, predict_peers(name, size))
        for provider, totals in read_totals(name, precision_of(name), size).items():
            us = totals.predicted_us + totals.launches * GPUS[name].launch_us
            typer.echo(f"predicted: {name}, batch {size}, {provider}: {totals.launches} launches, {us:.0f} us")


if __name__ == "__main__":
    typer.run(main)
