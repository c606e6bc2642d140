"""`python -m benchmarks.speed_model.peers`: predicts the kernels of eager and torch.compile in a training step.

Writes predicted/peers-<gpu>.csv: a row for each kernel. The GPU need not be there. Capturing and predicting what
torch.compile generates takes about three minutes for each GPU and batch size.
"""

import csv
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.results import replace_rows

from .eager import eager_rows
from .gpus import GPUS
from .inductor import compile_rows, run_capture
from .rows import Row, Totals, add_up

PREDICTED = Path(__file__).resolve().parents[1] / "predicted"
PROVIDERS = ("eager", "compile")
NUMBERS = {"launches": int, "predicted_us": float, "bytes": float}


def peers_path(gpu: str) -> Path:
    return PREDICTED / f"peers-{gpu}.csv"


def precision_of(gpu: str) -> str:
    """Return the 16-bit type in which one trains on the GPU: before sm_80 bf16 is emulated."""
    return "bf16" if GPUS[gpu].capability >= 80 else "fp16"


def predict_peers(gpu: str, batch_size: int) -> list[Row]:
    """Return the rows of eager and of torch.compile.

    Raises:
        RuntimeError: something that the capture needs is missing; see `inductor.run_capture`.
    """
    captured = run_capture(gpu, batch_size, precision_of(gpu), "resnet18")
    return eager_rows(GPUS[gpu], batch_size) + compile_rows(captured, GPUS[gpu])


def write_peers(gpu: str, batch_size: int, rows: list[Row]) -> None:
    """Put the rows into the GPU's file, in the place of those of the same batch size."""
    setting = {"batch_size": str(batch_size), "dtype": precision_of(gpu)}
    texts = [
        {**setting, **row._asdict(), "predicted_us": f"{row.predicted_us:.2f}", "bytes": f"{row.bytes:.0f}"}
        for row in rows
    ]
    replace_rows(peers_path(gpu), [{name: str(value) for name, value in text.items()} for text in texts], tuple(setting))


def read_totals(gpu: str, batch_size: int) -> dict[str, Totals]:
    """Return the predicted totals of eager and torch.compile, from the GPU's file; none if it has no such batch size.

    They lack the convolutions, the linear layer, the loss and the optimizer, which are every provider's alike.
    """
    if not peers_path(gpu).exists():
        return {}
    with open(peers_path(gpu), newline="", encoding="utf-8") as file:
        texts = [row for row in csv.DictReader(file) if row["batch_size"] == str(batch_size)]
    rows = [Row(**{name: NUMBERS.get(name, str)(text[name]) for name in Row._fields}) for text in texts]
    by_provider = {provider: [row for row in rows if row.provider == provider] for provider in PROVIDERS}
    return {provider: add_up(rows, GPUS[gpu]) for provider, rows in by_provider.items() if rows}


def main(
    gpu: Annotated[list[str], typer.Option(help=f"{', '.join(GPUS)}; several times for several.")] = ["h200"],  # noqa: B006
    batch_size: Annotated[list[int], typer.Option(help="Several times for several.")] = [128, 512],  # noqa: B006
) -> None:
    """Predict the kernels of eager and torch.compile in a training step of ResNet-18."""
    for name in gpu:
        for size in batch_size:
            write_peers(name, size, predict_peers(name, size))
            for provider, totals in read_totals(name, size).items():
                print(
                    f"predicted, {name}, batch {size}, {provider}: "
                    f"batch norm {totals.batch_norm_us:.0f} us in {totals.launches} launches, "
                    f"rest {totals.rest_us:.0f} us in {totals.rest_launches}"
                )


if __name__ == "__main__":
    typer.run(main)
