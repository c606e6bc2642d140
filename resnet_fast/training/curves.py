"""curves.png: the loss and the error of training and test, epoch by epoch."""

from collections.abc import Sequence
from typing import Any, BinaryIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from resnet_fast.training.metrics import EpochMetrics

TRAIN: dict[str, Any] = {"color": "#8a8f98", "linestyle": "--", "linewidth": 1.6}
TEST: dict[str, Any] = {"color": "#c2410c", "linestyle": "-", "linewidth": 2.2}


def draw_curves(file: BinaryIO, history: Sequence[EpochMetrics], title: str, n_epochs: int, n_test: int) -> None:
    """Write a PNG of two panels, both on a logarithmic scale: most of a run happens near zero.

    Args:
        file: open for writing in binary.
        history: the epochs so far, at least one.
        title: says what was trained on what.
        n_epochs: of the whole run, for the width of the axes.
        n_test: test images. No error is drawn below half an image, so that an error of 0 has a place.
    """
    epochs = [metrics.epoch for metrics in history]
    losses = [m.train_loss for m in history], [m.test_loss for m in history]
    half_an_image = 50 / n_test
    errors = (
        [max(100 * (1 - m.train_accuracy), half_an_image) for m in history],
        [max(100 * (1 - m.test_accuracy), half_an_image) for m in history],
    )
    last = history[-1]
    # Figure without pyplot: no global state, no window, and no backend to choose.
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: {100 * last.test_accuracy:.2f} % test accuracy after epoch {last.epoch}", fontsize=13)
    left, right = figure.subplots(1, 2)
    _draw_panel(left, "cross-entropy loss", epochs, *losses, f"{last.test_loss:.3g}", n_epochs)
    _draw_panel(right, "error (%)", epochs, *errors, f"{100 * (1 - last.test_accuracy):.2f} %", n_epochs)
    figure.savefig(file, format="png")


def _draw_panel(
    axes: Axes, name: str, epochs: list[int], train: list[float], test: list[float], label: str, n_epochs: int
) -> None:
    marker = "o" if n_epochs <= 40 else ""
    axes.plot(epochs, train, label="training, augmented images", marker=marker, markersize=4, **TRAIN)
    axes.plot(epochs, test, label="test", marker=marker, markersize=5, **TEST)
    axes.annotate(
        label,
        (epochs[-1], test[-1]),
        xytext=(8, 0),
        textcoords="offset points",
        color=TEST["color"],
        fontweight="bold",
        va="center",
        annotation_clip=False,
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0.5, n_epochs + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    axes.set_ylabel(name)
    axes.grid(which="major", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
