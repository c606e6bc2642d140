"""The same run with several seeds, which shows how far an accuracy depends on the seed."""

import csv
import io
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from resnet_fast.common.files import whole_file
from resnet_fast.training.config import SETTINGS, TrainConfig

if TYPE_CHECKING:
    from resnet_fast.training.metrics import Result


class Spread(NamedTuple):
    """Mean and standard deviation (of a sample: n - 1) of one quantity over the runs."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def repeated(config: TrainConfig, n_runs: int) -> Iterator[TrainConfig]:
    """Return the settings of each run, one by one: seeds config.seed, … and folders seed-<number> in config.out.

    Raises:
        ValueError: a seed would be too large.
    """
    check_seeds(config.seed, n_runs)
    seeds = range(config.seed, config.seed + n_runs)
    return (replace(config, seed=seed, out=config.out / f"seed-{seed}") for seed in seeds)


def check_seeds(seed: int, n_runs: int) -> None:
    """Raise ValueError if the last of `n_runs` consecutive seeds would be too large."""
    SETTINGS["seed"].rule.check("seed + repeat - 1", seed + n_runs - 1)


def write_summary(out: Path, results: "Sequence[Result]") -> None:
    """Write summary.csv: one row per run, with the accuracy after its last epoch."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["seed", "epochs", "accuracy", "mirrored_accuracy", "train_seconds", "seconds"])
    for result in results:
        mirrored = "" if result.mirrored_accuracy is None else f"{result.mirrored_accuracy:.6g}"
        times = f"{result.train_seconds:.6g}", f"{result.seconds:.6g}"
        writer.writerow([result.config.seed, len(result.history), f"{result.test_accuracy:.6g}", mirrored, *times])
    with whole_file(out / "summary.csv") as file:
        file.write(text.getvalue().encode())
