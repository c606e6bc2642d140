"""`python -m benchmarks.figures` draws the figures of the README and docs/results.md from the committed CSV files."""

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.results import RESULTS, ROOT, read_csv
from benchmarks.speed_model.gpus import GPUS
from benchmarks.style import DARK, color_of, new_figure, tidy
from resnet_fast.common.files import whole_file

STEPS = ROOT / "benchmarks/predicted/steps.csv"
HOST = RESULTS / "amd-epyc-1-threads/host_cost.csv"
# Bytes per element in 16-bit types that each kernel moves for relu(bn(x) + residual), whose output has two consumers
# (kernels/README.md, "Bytes moved per element").
PASSES = {
    "eager, forward": {"statistics": 2, "normalize": 4, "add": 6, "ReLU": 4},
    "fused, forward": {"statistics": 2, "normalize + add + ReLU": 6.125},
    "eager, backward": {"add gradients": 6, "ReLU": 6, "sums": 4, "dx": 6},
    "fused, backward": {"add gradients + ReLU + sums": 8.125, "dx": 6},
}
SHADES = ("#aab1bb", "#d3d8de")
FUSED_SHADES = ("#e8916a", "#f5c3ab")


def draw_passes() -> Figure:
    figure = new_figure(8.2, 2.9, "")
    axes = figure.subplots()
    for row, (name, kernels) in enumerate(PASSES.items()):
        at, shades = 0.0, FUSED_SHADES if name.startswith("fused") else SHADES
        for number, (kernel, n_bytes) in enumerate(kernels.items()):
            axes.barh(row, n_bytes, left=at, color=shades[number % 2], edgecolor="white", height=0.72)
            axes.text(at + n_bytes / 2, row, kernel, ha="center", va="center", fontsize=7.5, color=DARK)
            at += n_bytes
        axes.text(at + 0.2, row, f"{at:.1f}", va="center", fontsize=8, color=DARK)
    axes.set_yticks(range(len(PASSES)), list(PASSES), fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlabel(
        "bytes per element moved to and from memory, a box for each kernel (counted, 16-bit types)", fontsize=8
    )
    tidy(axes, "x")
    return figure


def draw_step() -> Figure:
    """Draw the predicted step: the batch norms' time for bytes and for launches, and the rest."""
    rows = [row for row in read_csv(STEPS) if (row["gpu"], row["precision"]) == ("h200", "bf16")]
    figure = new_figure(8.2, 2.9, "")
    for axes, batch in zip(figure.subplots(1, 2), ("128", "512"), strict=True):
        for place, provider in enumerate(("eager", "compile", "fused")):
            row = next(row for row in rows if (row["provider"], row["batch_size"]) == (provider, batch))
            launches = int(row["launches"]) * GPUS["h200"].launch_us / 1e3
            norms, step = float(row["batch_norm_us"]) / 1e3, float(row["step_ms"])
            parts = {"BN + add + ReLU": norms - launches, "launches": launches, "the rest": step - norms}
            at, colors = 0.0, (color_of(provider), "#6b7280", "#e5e7eb")
            for (part, ms), color in zip(parts.items(), colors, strict=True):
                axes.barh(place, ms, left=at, color=color, edgecolor="white", height=0.7)
                if place == 0:
                    axes.text(at + ms / 2, -0.52, part, ha="center", fontsize=6.5, color=DARK)
                at += ms
            axes.text(at, place, f" {step:.2f}", va="center", fontsize=8, color=DARK)
        axes.set_yticks(range(3), ["eager", "torch.compile", "resnet_fast"], fontsize=8.5)
        axes.set_title(f"batch {batch}", fontsize=9, loc="left", pad=14)
        axes.invert_yaxis()
        axes.set_xlabel("ms a step, predicted, H200, bf16", fontsize=8)
        axes.margins(x=0.12)
        tidy(axes, "x")
    return figure


def draw_host() -> Figure:
    rows = read_csv(HOST)
    figure = new_figure(8.2, 2.4, "")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        ratio = float(row["ratio"])
        axes.barh(place, ratio, color=color_of("fused"), height=0.62)
        left_of_line = min(ratio, 1) - 0.01
        axes.text(left_of_line, place, f"{ratio:.2f}", ha="right", va="center", fontsize=8, color="white")
    axes.axvline(1, color=DARK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("host time, fused / eager, measured with a driver that runs no kernel", fontsize=8)
    tidy(axes, "x")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {"passes.svg": draw_passes, "step.svg": draw_step, "host.svg": draw_host}


def digest() -> str:
    """Return a hash of the drawn data. Each figure stores it, because its bytes also depend on matplotlib's version."""
    return hashlib.sha256(STEPS.read_bytes() + HOST.read_bytes() + repr(PASSES).encode()).hexdigest()


def drawn() -> Iterator[tuple[Path, bytes]]:
    """Yield each file and its content."""
    metadata = {"Date": None, "Creator": None, "Description": digest()}
    for name, draw in FIGURES.items():
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
            content = io.BytesIO()
            draw().savefig(content, format="svg", facecolor="white", metadata=metadata)
        yield ROOT / "docs" / name, content.getvalue()


if __name__ == "__main__":
    for path, content in drawn():
        with whole_file(path) as file:
            file.write(content)
        print(path)
