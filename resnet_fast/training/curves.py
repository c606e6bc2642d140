"""curves.png: loss, error, learning rate and speed, epoch by epoch."""

from collections.abc import Sequence
from statistics import median
from typing import Any, BinaryIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from resnet_fast.training.metrics import EpochMetrics

TRAIN: dict[str, Any] = {"color": "#8a8f98", "linestyle": "--", "linewidth": 1.6}
TEST: dict[str, Any] = {"color": "#c2410c", "linestyle": "-", "linewidth": 2.2}
RATE: dict[str, Any] = {"color": "#3b6ea5", "linestyle": "-", "linewidth": 2.2}
SPEED: dict[str, Any] = {"color": "#3f8f6b", "linestyle": "-", "linewidth": 2.2}


def draw_curves(
    file: BinaryIO,
    history: Sequence[EpochMetrics],
    title: str,
    n_epochs: int,
    n_test: int,
    kind: str,
    augmented: bool,
) -> None:
    """Write a PNG of four panels. Loss and error have logarithmic scales, because most of their values are near 0.

    Args:
        file: a file open for writing in binary.
        history: the epochs so far, at least one.
        title: the names of network and data set.
        n_epochs: number of epochs of the whole run, for the width of the axes.
        n_test: number of test images. An error below half an image is drawn as half an image, so that 0 has a place.
        kind: the name of those images: "test" or "validation".
        augmented: whether training loss and error are measured on augmented images.
    """
    epochs = [metrics.epoch for metrics in history]
    losses = [m.train_loss for m in history], [m.test_loss for m in history]
    half_an_image = 50 / n_test
    errors = (
        [max(100 * (1 - m.train_accuracy), half_an_image) for m in history],
        [max(100 * (1 - m.test_accuracy), half_an_image) for m in history],
    )
    rates, speeds = [m.lr for m in history], [m.images_per_second for m in history]
    last = history[-1]
    # Figure without pyplot: no global state, no window, and no backend to choose.
    figure = Figure(figsize=(10, 6.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: {100 * last.test_accuracy:.2f} % {kind} accuracy after epoch {last.epoch}", fontsize=14)
    upper, lower = figure.subplots(2, 2, height_ratios=(3, 2))
    for axes, name, (train, test), label in (
        (upper[0], "cross-entropy loss", losses, f"{last.test_loss:.3g}"),
        (upper[1], "error (%)", errors, f"{100 * (1 - last.test_accuracy):.2f} %"),
    ):
        _draw_line(axes, epochs, train, n_epochs, TRAIN, "training, augmented images" if augmented else "training")
        _draw_line(axes, epochs, test, n_epochs, TEST, kind)
        _label_end(axes, epochs, test, label, TEST)
        _set_log_scale(axes, [*train, *test])
        finish_panel(axes, name, n_epochs)
        axes.legend(frameon=False)
    for axes, name, values, label, style in (
        (lower[0], "learning rate, at the end of the epoch", rates, f"{last.lr:.2g}", RATE),
        (lower[1], "training images/s", speeds, f"median {median(speeds):,.0f}", SPEED),
    ):
        _draw_line(axes, epochs, values, n_epochs, style)
        # From 0, so that neither the end of a schedule nor a change of speed looks larger than it is.
        axes.set_ylim(0, 1.3 * max(values) or 1)
        finish_panel(axes, name, n_epochs)
        axes.set_title(label, loc="right", color=style["color"], fontweight="bold", fontsize=11)
        axes.set_xlabel("epoch")
    lower[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    figure.savefig(file, format="png")


def _draw_line(
    axes: Axes, epochs: list[int], values: list[float], n_epochs: int, style: dict[str, Any], label: str = ""
) -> None:
    # A single epoch would be invisible without a marker.
    marker = "o" if n_epochs <= 40 or len(epochs) == 1 else ""
    axes.plot(epochs, values, label=label, marker=marker, markersize=4, **style)


def _label_end(axes: Axes, epochs: list[int], values: list[float], label: str, style: dict[str, Any]) -> None:
    axes.annotate(
        label,
        (epochs[-1], values[-1]),
        xytext=(8, 0),
        textcoords="offset points",
        color=style["color"],
        fontweight="bold",
        va="center",
        annotation_clip=False,
    )


def _set_log_scale(axes: Axes, values: list[float]) -> None:
    axes.set_yscale("log")
    middle = (min(values) * max(values)) ** 0.5
    if max(values) < 4 * min(values):  # else a few epochs would look as far apart as a whole run
        axes.set_ylim(middle / 2.2, middle * 2.2)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def finish_panel(axes: Axes, name: str, n_epochs: int) -> None:
    """Give a panel its name, whole numbers from 1 to `n_epochs` along the bottom, and a pale grid."""
    axes.set_title(name, loc="left", fontsize=12)
    axes.set_xlim(0.5, n_epochs + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(which="major", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
