"""The pictures of benchmarks/results/<device>/report.md, drawn only from the CSV files."""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import BinaryIO

from matplotlib.axes import Axes

from benchmarks.measured import LEVELS, Folder, Measurement
from benchmarks.roofline import draw_roofline, under_bandwidth, under_roofs
from benchmarks.speedups import LEFT_OUT, draw_speedups, panels
from benchmarks.style import DARK, color_of, new_figure, plain_ticks, round_numbers, save, tidy
from benchmarks.tables import providers_of, significant
from resnet_fast.profiling.categories import LAYOUT
from resnet_fast.profiling.picture import COLORS, REST

# The CSV files from which each picture is drawn.
SOURCES = {
    "speedups": tuple(level for level in LEVELS if level != LEFT_OUT),
    "roofline": ("training_step", "inference", "block", "op", "limits"),
    "step_time": ("training_step",),
    "categories": ("profile",),
}
MARKERS = "osD^vP*X"
RESTS = ("idle", "between operators")  # time in which nothing runs, drawn last and palest
PALE = {COLORS[LAYOUT], REST}
MIN_SHARE = 0.06  # narrower segments have no room for their number


def pictures(folder: Folder) -> dict[str, Callable[[BinaryIO], None]]:
    """Return, by name, a function that writes a picture to a file, for each picture that has data."""
    pictures_by_name = {}
    if panels(folder):
        pictures_by_name["speedups"] = draw_speedups
    if folder.limits and (under_roofs(folder) or under_bandwidth(folder)):
        pictures_by_name["roofline"] = draw_roofline
    if folder.rows.get("training_step"):
        pictures_by_name["step_time"] = draw_step_time
    if folder.parts:
        pictures_by_name["categories"] = draw_categories
    return {name: partial(draw, folder=folder, digest=digest(folder, name)) for name, draw in pictures_by_name.items()}


def digest(folder: Folder, name: str) -> str:
    """Return a hash of the picture's CSV files, because its own bytes also depend on matplotlib's version."""
    text = ", ".join(f"{source} {folder.digests[source]}" for source in SOURCES[name] if source in folder.digests)
    return hashlib.sha256(text.encode()).hexdigest()


def draw_step_time(file: BinaryIO, folder: Folder, digest: str) -> None:
    """Draw lines over the batch size on logarithmic axes or, for a single size, points with percentiles."""
    rows = folder.rows["training_step"]
    precisions = list(dict.fromkeys(row.precision for row in rows))
    single = len({row.batch_size for row in rows}) == 1
    n_providers = len(providers_of("training_step", rows))
    height = 1.9 + 0.32 * n_providers if single else 6.0
    figure = new_figure(6.4 * len(precisions) + 0.8, height, f"Time of a training step\n{folder.caption}")
    for axes, precision in zip(figure.subplots(1, len(precisions), squeeze=False)[0], precisions, strict=True):
        precision_rows = [row for row in rows if row.precision == precision]
        (_draw_points if single else _draw_lines)(axes, precision_rows)
        batch = f", batch {rows[0].batch_size}" if single else ""
        axes.set_title(f"{precision}{batch}", fontsize=11, loc="left")
    if not single:
        handles = {}
        for axes in figure.axes:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        n_columns = 2 * len(precisions)
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=n_columns, frameon=False, fontsize=10
        )
    save(figure, file, digest)


def _draw_points(axes: Axes, rows: list[Measurement]) -> None:
    names = providers_of("training_step", rows)
    for row in rows:
        y, color = names.index(row.provider), color_of(row.provider)
        axes.plot((row.ms.p20, row.ms.p80), (y, y), color=color, linewidth=2.2, alpha=0.6, solid_capstyle="butt")
        axes.plot(row.ms.p50, y, "o", color=color, markersize=8)
        axes.annotate(f"{significant(row.ms.p50)} ms", (1.02, y), xycoords=axes.get_yaxis_transform(), va="center")
    axes.set_xlim(0, 1.05 * max(row.ms.p80 for row in rows))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("ms: median, 20th to 80th percentile")
    axes.tick_params(axis="y", length=0)
    tidy(axes, "x")
    axes.spines["left"].set_visible(False)


def _draw_lines(axes: Axes, rows: list[Measurement]) -> None:
    for marker, name in zip(MARKERS * len(rows), providers_of("training_step", rows), strict=False):
        line = sorted((row.batch_size, row.ms) for row in rows if row.provider == name)
        sizes, times = [size for size, _ in line], [ms for _, ms in line]
        below, above = [ms.p50 - ms.p20 for ms in times], [ms.p80 - ms.p50 for ms in times]
        medians = [ms.p50 for ms in times]
        style = {"color": color_of(name), "marker": marker, "markersize": 6, "linewidth": 1.6, "capsize": 2}
        axes.errorbar(sizes, medians, (below, above), label=name, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_ticks(axes.xaxis, sorted({row.batch_size for row in rows}))
    low, high = min(row.ms.p20 for row in rows) / 1.3, max(row.ms.p80 for row in rows) * 1.3
    axes.set_ylim(low, high)
    plain_ticks(axes.yaxis, round_numbers(low, high))
    axes.set_xlabel("batch size")
    axes.set_ylabel("ms: median, 20th to 80th percentile")
    tidy(axes, "both")


def draw_categories(file: BinaryIO, folder: Folder, digest: str) -> None:
    """Draw one stacked bar for each provider, in a panel for each precision and batch size."""
    parts = folder.parts
    there = dict.fromkeys(part.category for part in parts)
    unknown = [name for name in there if name not in COLORS and name not in RESTS]
    colors = {name: color for name, color in COLORS.items() if name in there}
    colors |= {name: color_of(name) for name in unknown} | {name: REST for name in RESTS if name in there}
    settings = list(dict.fromkeys((part.precision, part.batch_size) for part in parts))
    n_bars = [len({part.provider for part in parts if (part.precision, part.batch_size) == key}) for key in settings]
    heights = [0.9 + 0.6 * n for n in n_bars]
    title = f"Time of a training step by category\n{folder.profiled_on or folder.path.name}"
    figure = new_figure(10, sum(heights) + 1.4, title)
    grid = figure.subplots(len(settings), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (precision, batch_size), axes in zip(settings, grid[:, 0], strict=True):
        ms = {
            (part.provider, part.category): part.ms
            for part in parts
            if (part.precision, part.batch_size) == (precision, batch_size)
        }
        _draw_stacks(axes, ms, colors)
        title = ", ".join(filter(None, [precision, batch_size and f"batch {batch_size}"]))
        axes.set_title(title, fontsize=11, loc="left")
    grid[-1, 0].set_xlabel("milliseconds per step, under the profiler")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    save(figure, file, digest)


def _draw_stacks(axes: Axes, ms: dict[tuple[str, str], float], colors: dict[str, str]) -> None:
    providers = list(dict.fromkeys(provider for provider, _ in ms))
    begins = dict.fromkeys(providers, 0.0)
    longest = max(sum(value for (name, _), value in ms.items() if name == provider) for provider in providers)
    for category, color in colors.items():
        widths = [ms.get((provider, category), 0.0) for provider in providers]
        bars = axes.barh(providers, widths, 0.62, list(begins.values()), color=color, edgecolor="white", label=category)
        texts = [significant(width) if width >= MIN_SHARE * longest else "" for width in widths]
        axes.bar_label(bars, texts, label_type="center", color=DARK if color in PALE else "white", fontsize=10)
        begins = {provider: begins[provider] + width for provider, width in zip(providers, widths, strict=True)}
    for provider, total in begins.items():
        axes.annotate(f" {significant(total)} ms", (total, provider), va="center", fontweight="bold")  # type: ignore[arg-type]
    axes.set_ylim(len(providers) - 0.5, -0.5)
    axes.set_xlim(0, 1.14 * longest)
    axes.tick_params(axis="y", length=0, labelsize=11)
    tidy(axes, "x")
    axes.spines["left"].set_visible(False)
