"""mistakes.png: the images on which a network was wrong with the highest confidence."""

import warnings
from collections.abc import Sequence
from typing import BinaryIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from resnet_fast.evaluation.confusion import shorten

COLUMNS = 5
CELL = 1.9  # inches
NAME_LENGTH = 16  # characters that fit a cell, next to an arrow and a probability


def draw_mistakes(
    file: BinaryIO,
    images: Tensor,
    labels: Tensor,
    predictions: Tensor,
    probabilities: Tensor,
    classes: Sequence[str],
    n: int = 25,
    title: str | None = None,
) -> None:
    """Write a PNG of the wrong answers with the highest probabilities, the worst first.

    Args:
        file: open for writing in binary.
        images: [N, 3, H, W], uint8; small ones are enlarged without smoothing.
        labels, predictions: [N], int64; images for which they agree are left out.
        probabilities: [N], of the prediction.
        classes: the name of each label.
        n: maximum number of images.
        title: of the figure; None: the number of mistakes shown and made.
    """
    wrong = (labels != predictions).nonzero()[:, 0]
    worst = wrong[probabilities[wrong].sort(descending=True, stable=True).indices][:n].tolist()
    if title is None:
        title = describe_mistakes(len(worst), len(wrong), len(labels))
    rows = max(1, -(-len(worst) // COLUMNS))
    height = 0.7 + rows * (CELL + 0.45) if worst else 1.4
    figure = Figure(figsize=(COLUMNS * CELL + 0.5, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if not worst:
        figure.text(0.5, 0.5, title, ha="center", va="center", fontsize=14, parse_math=False)
        figure.savefig(file, format="png")
        return
    figure.suptitle(title, fontsize=13, parse_math=False)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel().tolist()
    for axes in grid:
        axes.axis("off")
    interpolation = "nearest" if max(images.shape[2:]) <= 150 else "antialiased"
    for axes, index in zip(grid, worst, strict=False):
        true, taken_for = (shorten(classes[int(of[index])], NAME_LENGTH) for of in (labels, predictions))
        axes.imshow(images[index].permute(1, 2, 0).cpu().numpy(), interpolation=interpolation)
        text = f"{true}\n→ {taken_for}, {_percent(float(probabilities[index]))}"
        axes.set_title(text, fontsize=9, loc="left", parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the font lacks Chinese, Arabic …, and draws boxes
        figure.savefig(file, format="png")


def describe_mistakes(n_shown: int, n_wrong: int, n_images: int) -> str:
    """Return the title, which says how many of the mistakes are shown."""
    among = f"{n_images:,} images" if n_images != 1 else "1 image"
    if n_wrong == 0:
        return f"No mistake in {among}"
    if n_shown < n_wrong:
        return f"The {n_shown} most confident of {n_wrong:,} mistakes in {among}: true → predicted, probability"
    which = f"All {n_wrong} mistakes" if n_wrong > 1 else "The only mistake"
    return f"{which} in {among}: true → predicted, probability"


def _percent(probability: float) -> str:
    """Return "98.3 %"; a probability below 1 never becomes "100.0 %"."""
    return "> 99.9 %" if 0.9995 <= probability < 1 else f"{100 * probability:.1f} %"
