"""confusion.png: the confusion matrix."""

import warnings
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from resnet_fast.common.terminal import clean

ERRORS = LinearSegmentedColormap.from_list("errors", ["#ffffff", "#f6b48f", "#c2410c", "#7c2708"])
# Pale, so that right answers do not outshine errors.
RIGHT = LinearSegmentedColormap.from_list("right", ["#ffffff", "#a9c3dd"])
SMALLEST_FONT = 5  # points; smaller numbers are left out
MARGIN = 2.4  # inches around the cells, for class names and the color bar


def draw_confusion(file: BinaryIO, matrix: Tensor, classes: Sequence[str], title: str = "") -> None:
    """Write a PNG of the confusion matrix.

    Colors show shares of the true class, so that rare and frequent classes look alike. Errors and the diagonal have
    separate color scales; that of the errors ends at the largest error, with its lower part stretched. Numbers are
    counts, drawn if they fit the cell; zeros are left out.

    Args:
        file: open for writing in binary.
        matrix: [C, C], counts; rows are the true class, columns the predicted one.
        classes: C names.
        title: of the figure, such as the network and the data set.

    Raises:
        ValueError: matrix is not [C, C].
    """
    n_classes = len(classes)
    if matrix.shape != (n_classes, n_classes):
        raise ValueError(f"matrix must have shape ({n_classes}, {n_classes}), got {tuple(matrix.shape)}")
    counts: np.ndarray = matrix.cpu().numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.eye(n_classes, dtype=bool)
    # At least 1 %, so that one error among thousands does not stand out.
    norm = PowerNorm(0.6, vmin=0, vmax=max(0.01, shares[~right].max(initial=0)))
    pixels = np.where(right[:, :, None], RIGHT(shares), ERRORS(norm(shares)))

    side = min(14.0, 6 + 0.2 * n_classes)
    cell = 72 * (side - MARGIN) / n_classes  # points
    figure = Figure(figsize=(side + 0.6, side), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(pixels, interpolation="nearest")
    _name_axes(axes, classes, cell)
    digits = len(str(counts.max()))
    font = min(11.0, cell / (0.72 * digits))
    if font >= SMALLEST_FONT:
        for row, column in np.argwhere(counts).tolist():
            dark = not right[row, column] and norm(shares[row, column]) > 0.55
            color = "white" if dark else "#1f2328"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=font, color=color)
    bar = figure.colorbar(ScalarMappable(norm, ERRORS), ax=axes, shrink=0.6, pad=0.02)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    bar.set_label("errors: share of the true class (right answers are blue)")
    bar.outline.set_visible(False)  # type: ignore[operator]  # a Spine, which the stubs declare as a function
    if title:
        figure.suptitle(title, fontsize=13, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the font lacks Chinese, Arabic …, and draws boxes
        figure.savefig(file, format="png")


def shorten(name: str, length: int) -> str:
    """Return a name of at most `length` printable characters."""
    name = clean(name)
    return name if len(name) <= length else name[: length - 1] + "…"


def _name_axes(axes, classes: Sequence[str], cell: float) -> None:
    font = min(11.0, 0.85 * cell)
    step = 1 if font >= SMALLEST_FONT else -(-SMALLEST_FONT // font)  # name every step-th class
    ticks = list(range(0, len(classes), int(step)))
    names = [shorten(classes[i], 22) for i in ticks]
    font = max(font, SMALLEST_FONT)
    upright = max(map(len, names)) * 0.62 * font > cell * step
    rotation = 90 if upright else 0
    axes.set_xticks(ticks, names, fontsize=font, rotation=rotation, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=font, parse_math=False)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted", fontsize=12)
    axes.set_ylabel("true", fontsize=12)
    edges = np.arange(len(classes) + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color="#e5e7eb", linewidth=min(1.0, cell / 30))
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
