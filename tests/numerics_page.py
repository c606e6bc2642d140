"""`python tests/numerics_page.py [folder]`: measures every case; writes numerics.csv, the plots and the page's tables.

The folder is docs/ unless given; a numerics.md in it receives the tables between its two markers.
"""

import csv
import math
import os
import shutil
import sys
from pathlib import Path

import conftest  # noqa: F401  (chooses the interpreter where there is no GPU)
import torch
from matplotlib import pyplot
from numerics import CASES, DTYPES, IMAGES, PROVIDERS, RESULTS, errors
from pages import DOCS, write_tables

from benchmarks.results import machine_columns, write_rows

SWEEPS = {"mean": "|mean| / std", "rows": "N·H·W", "corner": "corner"}
PLOTS = {"mean": ("y", "dx", "dweight"), "rows": ("y", "dx", "running_var"), "corner": ("y", "dx")}
CORNER_NAMES = [case.name for case in CASES if case.sweep == "corner"]
GRADIENTS = ("dx", "dresidual", "dweight", "dbias")
# Okabe and Ito's colours, with markers of their own: readable without colours, too.
STYLES = {"ours": ("#0072B2", "o", "-"), "eager": ("#D55E00", "s", "--"), "torch.compile": ("#009E73", "^", ":")}
BEYOND, EXACT = 1e3, 1e-11  # where plots on log axes put what has no place on them

Row = dict[str, str]


def measure(device: torch.device) -> list[Row]:
    has_compiler = device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")) is not None
    providers = [name for name in PROVIDERS if has_compiler or name != "torch.compile"]
    machine = machine_columns(device)
    rows = []
    for case in CASES:
        for dtype in case.dtypes:
            print(case, dtype, flush=True)
            found = {name: errors(case, DTYPES[dtype], name, device) for name in providers}
            for result in RESULTS:
                figures = {
                    f"{name} {norm}": f"{getattr(found[name][result], norm):.3e}" if name in found else ""
                    for name in PROVIDERS
                    for norm in ("max", "rms")
                }
                place = {"sweep": case.sweep, "value": f"{case.value:g}", "layout": case.layout}
                rows.append({"case": case.name, "dtype": dtype, "result": result, **place, **figures, **machine})
    return rows


def read(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables(rows: list[Row]) -> str:
    """What stands between the markers, from nothing but the CSV."""
    machine = rows[0]
    lines = [
        f"Measured on {machine['device']}, {machine['cpu_threads']} threads, torch {machine['torch']}, triton "
        f"{machine['triton']}, commit {machine['commit']}, {machine['date_utc']}.",
    ]
    for sweep, title in SWEEPS.items():
        of_sweep = [row for row in rows if row["sweep"] == sweep]
        lines += ["", f"**{title}** (largest error; in each cell: ours / eager / torch.compile)", ""]
        lines += ["| | " + " | ".join(f"{what}, {dtype}" for what in ("y", "gradients") for dtype in DTYPES) + " |"]
        lines += ["|---" * (1 + 2 * len(DTYPES)) + "|"]
        for case in dict.fromkeys(row["case"] for row in of_sweep):
            of_case = [row for row in of_sweep if row["case"] == case]
            cells = [_cell(of_case, dtype, names) for names in (("y",), GRADIENTS) for dtype in DTYPES]
            lines.append(f"| {case} | " + " | ".join(cells) + " |")
    worst = sorted(rows, key=_ratio, reverse=True)[:12]
    lines += ["", "**Where ours is behind eager by most** (errors below a rounding count as a rounding)", ""]
    lines += ["| case | type | result | ours | eager | ratio |", "|---|---|---|---|---|---|"]
    for row in worst:
        figures = f"{_figure(row['ours max'])} | {_figure(row['eager max'])} | {_ratio(row):.2f}"
        lines.append(f"| {row['case']} | {row['dtype']} | {row['result']} | {figures} |")
    return "\n".join(lines)


def _figure(text: str) -> str:
    return (
        "–" if not text else "not finite" if math.isinf(float(text)) else f"{float(text):.1e}" if float(text) else "0"
    )


def _cell(rows: list[Row], dtype: str, results: tuple[str, ...]) -> str:
    """The largest error among `results`, of every provider."""
    chosen = [row for row in rows if row["dtype"] == dtype and row["result"] in results]
    if not chosen:
        return "–"
    return " / ".join(_figure(max((row[f"{name} max"] for row in chosen), key=_number)) for name in PROVIDERS)


def _number(text: str) -> float:
    return float(text or "nan")


def _ratio(row: Row) -> float:
    rounding = torch.finfo(DTYPES[row["dtype"]] if row["result"] in IMAGES else torch.float32).eps / 2
    eager = max(_number(row["eager max"]), rounding)
    return 1.0 if math.isinf(eager) else max(_number(row["ours max"]), rounding) / eager


def plot(rows: list[Row], sweep: str, results: tuple[str, ...], path: Path) -> None:
    """One row of panels for every result, one column for every type."""
    figure, panels = pyplot.subplots(
        len(results), len(DTYPES), figsize=(13, 3.2 * len(results)), sharex=True, sharey="row", squeeze=False
    )
    for line, result in zip(panels, results, strict=True):
        for panel, dtype in zip(line, DTYPES, strict=True):
            chosen = [r for r in rows if (r["sweep"], r["result"], r["dtype"]) == (sweep, result, dtype)]
            _draw(panel, chosen, sweep)
            panel.set_title(f"{result}, {dtype}")
        line[0].set_ylabel("largest error / scale")
    if sweep == "corner":
        for panel in panels[-1]:
            panel.set_xticks(range(len(CORNER_NAMES)), CORNER_NAMES, rotation=60, ha="right")
    else:
        panels[-1][1].set_xlabel(SWEEPS[sweep])
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="upper center", ncols=len(STYLES) + 1, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw(panel, rows: list[Row], sweep: str) -> None:
    places = [CORNER_NAMES.index(row["case"]) if sweep == "corner" else float(row["value"]) for row in rows]
    for shift, (provider, (color, marker, line)) in enumerate(STYLES.items(), -1):
        figures = [_number(row[f"{provider} max"]) for row in rows]
        panel.plot(
            [place + 0.2 * shift for place in places] if sweep == "corner" else places,
            [min(max(figure, EXACT), BEYOND) for figure in figures],
            color=color,
            marker=marker,
            linestyle="none" if sweep == "corner" else line,
            markersize=5,
            label=provider,
        )
    if rows:
        dtype = DTYPES[rows[0]["dtype"]] if rows[0]["result"] in IMAGES else torch.float32
        panel.axhline(torch.finfo(dtype).eps / 2, color="0.6", linewidth=1, label="one rounding of the result")
    panel.set_yscale("log")
    panel.set_ylim(EXACT / 3, BEYOND * 3)
    ticks = {EXACT: "0", 1e-8: "1e-8", 1e-6: "1e-6", 1e-4: "1e-4", 1e-2: "1e-2", 1: "1", BEYOND: "> 1e3, inf"}
    panel.set_yticks(list(ticks), ticks.values())
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    if sweep == "mean":
        panel.set_xscale("symlog", linthresh=1)
    elif sweep == "rows":
        panel.set_xscale("log", base=2)


def write(folder: Path) -> None:
    rows = measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    write_rows(folder / "numerics.csv", rows)
    draw(folder)


def draw(folder: Path) -> None:
    """The plots and the page's tables, from the CSV alone."""
    rows = read(folder / "numerics.csv")
    for sweep, results in PLOTS.items():
        plot(rows, sweep, results, folder / f"numerics-{sweep}.png")
    page = folder / "numerics.md"
    if page.exists():
        write_tables(page, tables(rows))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
