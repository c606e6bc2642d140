"""roofline.png: networks and blocks under the measured roofs, and the operation under the copy bandwidth."""

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.measured import Folder, MeasuredLimits, Measurement
from benchmarks.style import DARK, color_of, new_figure, plain_ticks, round_numbers, save, tidy
from benchmarks.tables import DIRECTIONS, significant

MARKERS = {"training_step": "s", "inference": "D", "block": "o"}
NAMES = {"training_step": "training step", "inference": "inference", "block": "block"}


def under_roofs(folder: Folder) -> dict[str, list[tuple[str, Measurement]]]:
    """Return (level, row) by precision, for rows that multiply and whose precision has a measured matrix rate."""
    grouped: dict[str, list[tuple[str, Measurement]]] = {}
    for level in MARKERS:
        for row in folder.rows.get(level, []):
            if row.gflop and row.mbytes and folder.limits and row.precision in folder.limits.matrix:
                grouped.setdefault(row.precision, []).append((level, row))
    return grouped


def under_bandwidth(folder: Folder) -> dict[str, list[Measurement]]:
    """Return the operation's rows by precision: forward and backward together if measured, else the first direction."""
    rows = [row for row in folder.rows.get("op", []) if row.mbytes and row.gb_per_s]
    both = [row for row in rows if row.direction == "both"]
    grouped: dict[str, list[Measurement]] = {}
    for row in both or [row for row in rows if row.direction == rows[0].direction]:
        grouped.setdefault(row.precision, []).append(row)
    return grouped


def draw_roofline(file: BinaryIO, folder: Folder, digest: str) -> None:
    """Write the PNG to `file`, which is open in binary mode. The folder must have limits."""
    assert folder.limits is not None
    roofs, bands = under_roofs(folder), under_bandwidth(folder)
    lines = [line for line in (roofs, bands) if line]
    n_columns = max(map(len, lines))
    figure = new_figure(6.6 * n_columns + 0.6, 4.6 * len(lines) + 1.1, f"Under the measured roofs\n{folder.caption}")
    grid = figure.subplots(len(lines), n_columns, squeeze=False)
    for line, row_of_axes in zip(lines, grid, strict=True):
        for precision, axes in zip(line, row_of_axes, strict=False):
            if line is roofs:
                _draw_roofs(axes, precision, roofs[precision], folder.limits)
            else:
                _draw_bandwidth(axes, precision, bands[precision], folder.limits)
        for axes in row_of_axes[len(line) :]:
            axes.set_axis_off()
    _legend(figure, 1 + n_columns, roofs, bands)
    save(figure, file, digest)


def _draw_roofs(axes: Axes, precision: str, rows: Sequence[tuple[str, Measurement]], limits: MeasuredLimits) -> None:
    """Draw TFLOP/s over operations per byte; GB/s x operations/byte = GFLOP/s."""
    copy, matrix = limits.copy / 1e3, limits.matrix[precision]
    points = [(level, row, row.gflop / row.mbytes * 1e3, row.gflop / row.ms.p50) for level, row in rows]  # type: ignore[operator]
    around = [x for _, _, x, _ in points] + [matrix / copy]
    low, high = min(around) / 4, max(around) * 4
    x = np.geomspace(low, high, 200)
    axes.plot(x, np.minimum(copy * x, matrix), color=DARK, linewidth=1.8)
    axes.plot(x, 1 / (1 / (copy * x) + 1 / matrix), color=DARK, linewidth=1, linestyle="--")
    for level, row, x_of, y_of in points:
        size = 7 if level == "training_step" else 5.5  # the others have more points
        axes.plot(x_of, y_of, MARKERS[level], color=color_of(row.provider), markersize=size, mec="white", mew=0.6)
    bottom, top = min([y for *_, y in points] + [matrix / 4]) / 1.6, matrix * 1.9
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, top)
    plain_ticks(axes.xaxis, round_numbers(low, high))
    plain_ticks(axes.yaxis, round_numbers(bottom, top))
    axes.annotate(
        f"matrix product {significant(matrix)} TFLOP/s", (high, matrix), (-4, 5), textcoords="offset points", ha="right"
    )
    axes.annotate(f"copy {significant(limits.copy)} GB/s", (0.02, 0.95), xycoords="axes fraction", va="top")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Networks and blocks, {precision}", fontsize=11, loc="left")
    tidy(axes, "both")


def _draw_bandwidth(axes: Axes, precision: str, rows: Sequence[Measurement], limits: MeasuredLimits) -> None:
    for row in rows:
        assert row.mbytes and row.gb_per_s
        color = color_of(row.provider)
        is_open = row.layout != "channels_last"
        axes.plot(
            row.mbytes,
            row.gb_per_s,
            "o",
            markersize=6,
            markerfacecolor="none" if is_open else color,
            markeredgecolor=color if is_open else "white",
            markeredgewidth=1.2 if is_open else 0.6,
        )
    sizes = [row.mbytes for row in rows if row.mbytes]
    low, high = min(sizes) / 1.4, max(sizes) * 1.4
    axes.axhline(limits.copy, color=DARK, linewidth=1.8)
    axes.annotate(
        f"copy {significant(limits.copy)} GB/s", (high, limits.copy), (-4, 5), textcoords="offset points", ha="right"
    )
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1.15 * max([limits.copy, *(row.gb_per_s for row in rows if row.gb_per_s)]))
    plain_ticks(axes.xaxis, round_numbers(low, high))
    axes.set_xlabel("MB moved by the fused design")
    axes.set_ylabel("GB/s")
    direction = DIRECTIONS.get(rows[0].direction, rows[0].direction)
    axes.set_title(f"Fused operation, {direction}, {precision}", fontsize=11, loc="left")
    tidy(axes, "y")


def _legend(
    figure: Figure, n_columns: int, roofs: dict[str, list[tuple[str, Measurement]]], bands: dict[str, list[Measurement]]
) -> None:
    rows = [row for line in roofs.values() for _, row in line] + [row for line in bands.values() for row in line]
    handles = [
        Line2D([], [], color=color_of(name), marker="o", linestyle="none", label=name)
        for name in dict.fromkeys(row.provider for row in rows)
    ]
    for level, marker in MARKERS.items():
        if any(level == name for line in roofs.values() for name, _ in line):
            handles.append(Line2D([], [], color=DARK, marker=marker, linestyle="none", label=NAMES[level]))
    if any(row.layout != "channels_last" for line in bands.values() for row in line):
        label = "operation, NCHW"
        handles.append(Line2D([], [], color=DARK, marker="o", mfc="none", linestyle="none", label=label))
    if roofs:
        handles.append(Line2D([], [], color=DARK, linewidth=1.8, label="roof: bytes and operations at the same time"))
        handles.append(Line2D([], [], color=DARK, linestyle="--", label="floor: first bytes, then operations"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(n_columns, 3), frameon=False, fontsize=10)
