"""The stages of `make gpu` in their order: the command, time limit and result of each."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import read_csv

PYTEST = "{python} -m pytest -q -p no:cacheprovider -m gpu"


class Stage(NamedTuple):
    """A shell command, its time limit in seconds, what it proves, and a function that reads its figure.

    `command` may contain {python}, {results} (the GPU's folder), {scratch} (an empty folder) and {workers} (an option
    of pytest's, or nothing). `figure` is called with the GPU's folder and the output, and returns "" without a figure.
    """

    name: str
    command: str
    seconds: int
    proves: str
    figure: Callable[[Path, str], str]


def last(pattern: str) -> Callable[[Path, str], str]:
    """Return a function that finds the pattern's last match in the output."""
    return lambda folder, output: (re.findall(pattern, output, re.MULTILINE) or [""])[-1].strip()


def rows_of(path: Path) -> list[dict[str, str]]:
    return read_csv(path) if path.exists() else []


def accuracies(folder: Path, output: str) -> str:
    found = re.findall(r"([\d.]+ %) test accuracy", output)
    return f"test accuracy {' and '.join(found)}" if found else ""


def step_times(folder: Path, output: str) -> str:
    """Return the times of the fused step in a CUDA graph."""
    rows = [row for row in rows_of(folder / "training_step.csv") if row["provider"] == "fused, graph"]
    times = [f"{row['batch_size']}: {float(row['p50_ms']):.2f} ms, {float(row['speedup_p50']):.2f}x" for row in rows]
    return f"{'; '.join(times)} of eager, tuned" if times else ""


def shares(folder: Path, output: str) -> str:
    """Return the shares of the fused step for combining partial results and for idle time."""
    rows = [row for row in rows_of(folder / "profile.csv") if row["provider"] == "fused"]
    total = sum(float(row["ms_per_step"]) for row in rows)

    def share(column: str, word: str) -> float:
        return sum(float(row["ms_per_step"]) for row in rows if word in row[column]) / total

    return f"fused: combine {share('kernel', 'combine_'):.1%}, idle {share('category', 'idle'):.1%}" if total else ""


def predictions(folder: Path, output: str) -> str:
    rows = rows_of(folder / "first_predictions.csv")
    return "; ".join(
        f"{row['name'].removesuffix('_kernel')}, {row['variant']}: {row['measured']} {row['unit']}"
        + (f" (predicted {row['predicted']})" if row["predicted"] else "")
        for row in rows
    )


PASSED = last(r"^=*\s*(\d.* in [\d.]+s.*?)=*$")  # pytest's last line
VERSIONS = "import torch, triton; print(torch.__version__, triton.__version__, torch.backends.cudnn.version())"
TRAIN = "{python} -m resnet_fast.cli train --dataset digits --epochs 3 --out {scratch}"
STAGES = [
    Stage(
        "environment",
        "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader && nvidia-smi "
        f"&& ${{{{CC:-gcc}}}} --version && {{python}} -c {shlex.quote(VERSIONS)}",
        15,
        "versions of the driver, compiler and packages",
        lambda folder, output: output.partition("\n")[0],
    ),
    Stage(
        "doctor",
        "{python} -m resnet_fast.cli doctor && {python} -m resnet_fast.cli doctor",  # the second compiles the rest
        45,
        "compiled kernels agree with fp64",
        last(r"parity +(right: \d+ of \d+ checks)"),
    ),
    Stage(
        "graph",
        f"{PYTEST} tests/test_graphed.py tests/test_graphed_step.py",
        45,
        "a step in a CUDA graph is bit-identical to one without",
        PASSED,
    ),
    Stage(
        "train",
        f"{TRAIN}/graph && {TRAIN}/loop --no-graph",
        80,
        "training, evaluation and checkpoint, in a CUDA graph and without",
        accuracies,
    ),
    Stage(
        "tests",
        f"{PYTEST} {{workers}} --ignore-glob='tests/test_graphed*' tests",
        150,
        "compiled kernels pass their tests",
        PASSED,
    ),
    Stage(
        "step",
        "{python} -m pytest -q benchmarks/bench_step.py --quick --rounds 30 -k 'not compile' --results {results}/..",
        90,
        "time of a training step, eager and fused, in a CUDA graph and without",
        step_times,
    ),
    Stage(
        "profile",
        "{python} -m resnet_fast.cli profile --batch-size 512 --out {scratch}/profile "
        "&& cp {scratch}/profile/profile.csv {results}",
        50,
        "where the time of a step goes",
        shares,
    ),
    Stage(
        "predictions",
        "{python} -m benchmarks.first_predictions --results {results}/..",
        45,
        "how far the speed model's predictions are off",
        predictions,
    ),
    Stage(
        "tune",
        "XDG_CACHE_HOME={scratch} {python} -m resnet_fast.cli tune --batch-size 512 --rounds 10 --time-budget 2m; "
        "code=$?; "
        "cp {scratch}/resnet_fast/choices-*.json {results}/choices.json; exit $code",
        150,
        "optional kernels are correct; which are faster",
        last(r"(\d+ of \d+ differ from the default)"),
    ),
]
