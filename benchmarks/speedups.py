"""speedups.png: bars on a logarithmic axis that start at the baseline and point right if a provider is faster."""

import math
import statistics
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from matplotlib.axes import Axes

from benchmarks.measured import LEVELS, Folder, Measurement
from benchmarks.style import DARK, color_of, new_figure, plain_ticks, round_numbers, save, tidy
from benchmarks.tables import TITLES, operation_and_shape, providers_of

BAR = 0.21  # inches, enough for a line of text
HEADING = 0.85  # inches of a panel's title and axis
LEFT_OUT = "convolution"  # each of its tilings would have a bar; report.md has the table


class Bar(NamedTuple):
    """A provider's speed-ups in a group of settings that differ only in the tensors' shape."""

    provider: str
    rows: Sequence[Measurement]

    @property
    def speedup(self) -> float:
        return statistics.median(row.speedup.p50 for row in self.rows)

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the whisker: the percentiles of a single setting, else the least and greatest median."""
        if len(self.rows) == 1:
            return self.rows[0].speedup.p20, self.rows[0].speedup.p80
        ratios = [row.speedup.p50 for row in self.rows]
        return min(ratios), max(ratios)


class Panel(NamedTuple):
    """A level in one precision and layout, with bars by the label of their group."""

    title: str
    groups: dict[str, list[Bar]]

    @property
    def height(self) -> float:
        """The height in bars, with half a bar for each group."""
        return sum(map(len, self.groups.values())) + 0.5 * len(self.groups)


def panels(folder: Folder) -> list[list[Panel]]:
    """Return lines of panels. Each line shows one level, in its precisions or, if it has several, layouts."""
    lines = []
    for level, rows in folder.rows.items():
        if level == LEFT_OUT:
            continue
        directions = dict.fromkeys(row.direction for row in rows)
        direction = "both" if "both" in directions else next(iter(directions))
        rows = [row for row in rows if row.direction == direction]
        layouts = list(dict.fromkeys(row.layout for row in rows))
        line: list[Panel] = []
        for precision in dict.fromkeys(row.precision for row in rows):
            for layout in layouts:
                chosen = [row for row in rows if (row.precision, row.layout) == (precision, layout)]
                panel = Panel(_title(level, direction, precision, layout), _groups(level, chosen))
                line += [panel] * bool(panel.groups)
            if len(layouts) > 1:
                lines, line = [*lines, line], []
        lines.append(line)
    return [line for line in lines if line]


def _title(level: str, direction: str, precision: str, layout: str) -> str:
    what = f"{TITLES[level]}, {direction}" if direction in ("forward", "backward") else TITLES[level]
    return f"{what}: {precision}, {layout}; over {LEVELS[level].baseline}"


def _groups(level: str, rows: Sequence[Measurement]) -> dict[str, list[Bar]]:
    groups: dict[str, list[Bar]] = {}
    cases = {operation_and_shape(row.case)[0] for row in rows}
    for case, batch_size in dict.fromkeys((operation_and_shape(row.case)[0], row.batch_size) for row in rows):
        group_rows = [row for row in rows if (operation_and_shape(row.case)[0], row.batch_size) == (case, batch_size)]
        bars = [
            Bar(provider, [row for row in group_rows if row.provider == provider])
            for provider in providers_of(level, group_rows)
            if provider != LEVELS[level].baseline
        ]
        if bars:
            label = f"batch {batch_size}" if len(cases) == 1 else f"{case}, batch {batch_size}"
            groups[label] = bars
    return groups


def draw_speedups(file: BinaryIO, folder: Folder, digest: str) -> None:
    """Write the PNG to `file`, which is open in binary mode."""
    lines = panels(folder)
    n_columns = max(map(len, lines))
    heights = [BAR * max(panel.height for panel in line) for line in lines]
    figure = new_figure(7.8 * n_columns, sum(heights) + HEADING * len(lines) + 0.9, f"Speed-up\n{folder.caption}")
    grid = figure.subplots(len(lines), n_columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, row_of_axes in zip(lines, grid, strict=True):
        ends = [end for panel in line for bars in panel.groups.values() for bar in bars for end in bar.ends]
        low, high = min(ends + [1]) / 1.05, max(ends + [1]) * 1.05
        for panel, axes in zip(line, row_of_axes, strict=False):
            _draw(axes, panel, max(panel.height for panel in line), (low, high))
        for axes in row_of_axes[len(line) :]:
            axes.set_axis_off()
    caption = "Blocks and operations run forward and backward unless the title says otherwise.\n"
    caption += "Bars: medians. Lines: 20th to 80th percentile of the rounds"
    if any(len(bar.rows) > 1 for line in lines for panel in line for bars in panel.groups.values() for bar in bars):
        caption += ";\nwith dots: a dot for each shape of tensor, the bar their median"
    figure.supxlabel(f"{caption}.", fontsize=9, x=0.01, ha="left")
    save(figure, file, digest)


def _draw(axes: Axes, panel: Panel, height: float, limits: tuple[float, float]) -> None:
    y, label_at = 0.0, []
    for bars in panel.groups.values():
        label_at.append(y + (len(bars) - 1) / 2)
        for bar in bars:
            color = color_of(bar.provider)
            axes.barh(y, bar.speedup - 1, left=1, height=0.78, color=color)
            axes.plot(bar.ends, (y, y), color=DARK, linewidth=1, solid_capstyle="butt")
            if len(bar.rows) > 1:
                dots = [row.speedup.p50 for row in bar.rows]
                axes.plot(dots, [y] * len(dots), "o", color=DARK, markersize=3.2, markeredgecolor="white", mew=0.4)
            text = f"{bar.speedup:.2f}× {bar.provider}"
            where = {"xycoords": axes.get_yaxis_transform(), "va": "center", "annotation_clip": False}
            axes.annotate(text, (1.02, y), fontsize=9, color=DARK, **where)
            y += 1
        y += 0.5
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    plain_ticks(axes.xaxis, _ratios(*limits), "×")
    axes.axvline(1, color=DARK, linewidth=1)
    axes.set_ylim(height - 0.5 - 0.25, -0.75)
    axes.set_yticks(label_at, list(panel.groups), fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.set_title(panel.title, fontsize=11, loc="left")
    tidy(axes, "x")
    axes.spines["left"].set_visible(False)


def _ratios(low: float, high: float) -> list[float]:
    """Return the ticks: 1, and others on both sides, far enough apart for their labels."""
    if math.log(high / low) > math.log(2.2):
        ticks = round_numbers(low, high)
    else:
        ticks = [1 + i / 20 for i in range(-20, 30) if low <= 1 + i / 20 <= high]
    room = math.log(high / low) / 8
    kept = [1.0]
    for side in (sorted(x for x in ticks if x > 1), sorted((x for x in ticks if x < 1), reverse=True)):
        last = 1.0
        for x in side:
            if abs(math.log(x / last)) >= room:
                kept.append(last := x)
    return kept
