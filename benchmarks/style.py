"""Colors, axes and file format of the pictures of the results."""

from collections.abc import Sequence
from typing import Any, BinaryIO

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

COLORS = {
    "eager": "#9aa1ab",
    "eager, tuned": "#4b5563",
    "eager, tuned, graph": "#8c6bb1",
    "compile": "#0072b2",
    "compile, max-autotune": "#56b4e9",
    "fused": "#c2410c",
    "fused, graph": "#e69f00",
    "fused, chosen": "#e7298a",
    "fused, chosen, graph": "#b2182b",
    "fused, single read": "#7f3b08",
    "fused, two passes reversed": "#f4a582",
    "fused, apart": "#a8a200",
    "folded": "#117733",
    "folded, graph": "#7fbc41",
    "attorch": "#009e73",
    "apex": "#cc79a7",
    "timm": "#8b5a2b",
    "torchvision": "#4b5563",
    "on device": "#c2410c",
}
OTHER_COLORS = ("#1b7837", "#762a83", "#b35806", "#35978f")
DARK = "#1f2328"
GRID: dict[str, Any] = {"color": "#e5e7eb", "linewidth": 0.8}
DPI = 110


def color_of(provider: str) -> str:
    """Return a provider's color, the same in all pictures and, for providers unknown here, in all runs."""
    return COLORS.get(provider) or OTHER_COLORS[sum(provider.encode()) % len(OTHER_COLORS)]


def new_figure(width: float, height: float, title: str) -> Figure:
    # Without pyplot there is no global state, no window, and no backend to choose.
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return figure


def save(figure: Figure, file: BinaryIO, digest: str) -> None:
    """Write a PNG that holds `digest` but no date or version, so that the same data give the same bytes."""
    figure.savefig(file, format="png", metadata={"Software": None, "Data": digest})


def tidy(axes: Axes, grid: str) -> None:
    """Remove the box, and draw a pale grid along one axis or "both" behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, which="major", **GRID)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def plain_ticks(axis: Axis, ticks: Sequence[float], unit: str = "") -> None:
    """Label a logarithmic axis at `ticks`, with plain numbers."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.set_minor_locator(NullLocator())


def round_numbers(low: float, high: float) -> list[float]:
    """Return numbers from `low` to `high` for a logarithmic axis, like 1, 2, 5 or, if these are few, 0.8, 0.9, 1."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [
            float(f"{step * 10.0**exponent:.6g}")
            for exponent in range(-12, 13)
            for step in steps
            if low <= step * 10.0**exponent <= high
        ]
        if len(ticks) >= 5:
            return ticks[:: 1 + len(ticks) // 11]
    return ticks
