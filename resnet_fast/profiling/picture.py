"""profile.png: one stacked bar per provider, the same categories in the same order and colors."""

from collections.abc import Sequence
from typing import BinaryIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from resnet_fast.profiling.categories import CATEGORIES, CONVOLUTION, LAYOUT, LOSS, NORM, OPTIMIZER, OTHER
from resnet_fast.profiling.recording import StepProfile

# The part that this library fuses stands out; idle time is palest.
COLORS = {
    CONVOLUTION: "#3b6ea5",
    NORM: "#c2410c",
    LAYOUT: "#d9a514",
    OPTIMIZER: "#6b4c9a",
    LOSS: "#3f8f6b",
    OTHER: "#8a8f98",
}
REST = "#e3e6ea"
DARK = {"#3b6ea5", "#c2410c", "#6b4c9a", "#3f8f6b"}
# Narrower segments have no room for a number.
MIN_SHARE = 0.045


def draw_bars(file: BinaryIO, profiles: Sequence[StepProfile], title: str, device: str, rest: str) -> None:
    """Write a PNG of milliseconds per profiled step by category.

    Args:
        file: open for writing in binary.
        profiles: the bars, from the top down.
        title: of the figure.
        device: name of the device.
        rest: the category of the time in which nothing runs.
    """
    # Figure without pyplot: no global state, no window, and no backend to choose.
    figure = Figure(figsize=(10, 1.9 + 0.75 * len(profiles)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    longest = max(profile.ms for profile in profiles)
    names = [profile.provider for profile in profiles]
    begins = [0.0] * len(profiles)
    for category in (*CATEGORIES, rest):
        color = COLORS.get(category, REST)
        widths = [profile.ms_of(category) for profile in profiles]
        bars = axes.barh(names, widths, left=begins, height=0.62, color=color, edgecolor="white", label=category)
        texts = [format_ms(width, longest) if width >= MIN_SHARE * longest else "" for width in widths]
        axes.bar_label(bars, texts, label_type="center", color="white" if color in DARK else "#1f2328", fontsize=10)
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    for name, profile in zip(names, profiles, strict=True):
        total = f" {format_ms(profile.ms, longest)} ms"
        axes.annotate(total, (profile.ms, name), va="center", fontweight="bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * longest)  # room for the totals
    axes.set_xlabel(f"milliseconds per step, under the profiler; {device}")
    axes.set_title(title, loc="left", fontsize=13)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=12)
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    figure.savefig(file, format="png")


def format_ms(ms: float, of: float) -> str:
    """Return milliseconds with the decimals for a step of `of` milliseconds, to a thousandth of it or finer."""
    decimals = 1 if of >= 100 else 2 if of >= 10 else 3
    return f"{ms:.{decimals}f}"
