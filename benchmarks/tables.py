"""The tables of benchmarks/results/<device>/report.md and of docs/results.md, as Markdown."""

import itertools
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.measured import LEVELS, Folder, Measurement, Origin
from benchmarks.predictions import beside_measured

TITLES = {
    "training_step": "Training step",
    "inference": "Inference",
    "block": "Block",
    "op": "Fused operation",
    "convolution": "Convolution",
    "loader": "Loader, one epoch",
}
NETWORKS = {"training_step": "step", "inference": "pass"}  # names of a run
DIRECTIONS = {"both": "forward and backward"}
PICTURES = {
    "speedups": "Speed-up over the baseline, by level",
    "roofline": "Roofline of networks and blocks, and bandwidth of the operation",
    "step_time": "Time of the training step against batch size",
    "categories": "Time of the training step by category",
}
UNTUNED = "`eager` is PyTorch with default settings: fp32, NCHW"
COLUMNS_MEAN = """\
The columns:

- **ms**: median time of a run over the rounds (20th – 80th percentile).
- **speed-up**: the baseline's time / this provider's time in the same round, median (20th – 80th percentile). Rounds
  are paired, so it is not the ratio of the two medians. Above 1 is faster than the baseline.
- **GB/s**: bytes / median time. For every provider the bytes are those of the fused two-pass design, in inference those
  of each layer's input, weights and output. A provider that moves more shows a lower bandwidth.
- **% of floor**: floor / median time. The floor is the time of those bytes at the copy bandwidth plus the time of the
  operations at the matrix rate, both measured in the same run. The share exceeds 100 % if bytes stay in a cache, or if
  convolutions multiply faster than the measured product of square matrices.
- **peak MB**: the largest memory allocated on the GPU during a run, including the provider's own weights and inputs.
- **images/s**: images / median time."""
CONVOLUTIONS_MEAN = """\
The table compares cuDNN with our fastest tiling in the same rounds, whether it wins or loses. All tilings, with their
spread, are below. TFLOP/s are the convolution's operations (2·9·C_in·C_out·N·H·W) / median time. "With statistics" and
"with sums" include, for cuDNN, the batch norm's pass that ours does not need. In "forward" ours also computes the
statistics."""


def report(folder: Folder, pictures: Iterable[str]) -> str:
    """Return the text of report.md, with links to the pictures of these names."""
    lines = [f"# {folder.title}", "", "Made from the CSV files in this folder by `python -m benchmarks.report`.", ""]
    lines += [*_about(folder), "", COLUMNS_MEAN]
    for picture in pictures:
        if picture != "categories":
            lines += ["", f"![{PICTURES[picture]}]({picture}.png)"]
    for name, rows in folder.rows.items():
        lines += ["", f"## {TITLES[name]}", "", f"The baseline is `{LEVELS[name].baseline}`."]
        if name in NETWORKS and any(row.provider == "eager" for row in rows):
            lines[-1] += f" {UNTUNED}."
        if name == "convolution":
            lines += ["", CONVOLUTIONS_MEAN, "", *_convolutions(folder.origins, rows)]
        facets = list(dict.fromkeys((row.direction, row.precision, row.layout) for row in rows))
        for facet in facets:
            facet_rows = [row for row in rows if (row.direction, row.precision, row.layout) == facet]
            lines += ["", f"### {TITLES[name]}: {_direction(facet[0])}{facet[1]}, {facet[2]}", ""]
            lines += [*_table(folder, name, facet_rows), *beside_measured(facet_rows)]
    if folder.parts:
        where = folder.profiled_on or "profile.csv does not say where it was measured"
        lines += ["", "## Training step by category", "", f"Milliseconds per step under the profiler: {where}."]
        if "categories" in pictures:
            lines += ["", f"![{PICTURES['categories']}](categories.png)"]
        lines += ["", *_categories(folder)]
    return "\n".join(lines) + "\n"


def _direction(direction: str) -> str:
    return "" if direction in ("step", "epoch") else f"{DIRECTIONS.get(direction, direction)}, "


def _about(folder: Folder) -> list[str]:
    lines = [f"- Measured on {folder.origins[0]}."] if len(folder.origins) == 1 else []
    if len(folder.origins) > 1:
        lines = ["- Measured at different times; the number after a provider says which:"]
        lines += [f"  - <sup>{number}</sup> {origin}" for number, origin in enumerate(folder.origins, 1)]
    if folder.limits:
        rates = [f"{rate:.3g} TFLOP/s in {precision}" for precision, rate in folder.limits.matrix.items()]
        when = "" if folder.limits.origin in folder.origins[-1:] else f" ({folder.limits.origin})"
        lines.append(
            f"- Limits, as last measured{when}: copy {folder.limits.copy:.4g} GB/s (read plus written), matrix product "
            f"{', '.join(rates)}."
        )
    return lines


def marks(origins: Sequence[Origin], rows: Sequence[Measurement]) -> str:
    """Return the numbers of the rows' origins, if several origins are listed."""
    numbers = sorted({origins.index(row.origin) + 1 for row in rows}) if len(origins) > 1 else []
    return f"<sup>{', '.join(map(str, numbers))}</sup>" if numbers else ""


def _table(folder: Folder, level: str, rows: Sequence[Measurement]) -> list[str]:
    """Return the table of one direction, precision and layout, without columns that are empty in all rows."""

    def provider(row: Measurement) -> str:
        return f"{row.provider}{marks(folder.origins, [row])}"

    columns: dict[str, Callable[[Measurement], str]] = {
        "provider": provider,
        "ms": lambda row: f"{significant(row.ms.p50)} ({significant(row.ms.p20)} – {significant(row.ms.p80)})",
        "speed-up": lambda row: speedup(level, row),
        "GB/s": lambda row: f"{row.gb_per_s:,.2f}" if row.gb_per_s else "",
        "% of floor": lambda row: percent(row.of_floor) if row.of_floor else "",
        "peak MB": lambda row: "" if row.peak_mb is None else f"{row.peak_mb:,.1f}",
    }
    if level == "convolution":
        columns["TFLOP/s"] = lambda row: significant(row.tflop_per_s) if row.tflop_per_s else ""
    if level in NETWORKS or level == "loader":
        columns["images/s"] = lambda row: f"{row.images_per_s:,.0f}"
    table, last = [], None
    for row in rows:
        setting = ["", ""] if row.setting == last else [row.case, str(row.batch_size)]
        table.append([*setting, *(cell(row) for cell in columns.values())])
        last = row.setting
    return markdown(["case", "batch", *columns], table)


def _convolutions(origins: Sequence[Origin], rows: Sequence[Measurement]) -> list[str]:
    """Return a table with a line for each setting: cuDNN, and our fastest tiling."""
    baseline = LEVELS["convolution"].baseline
    table = []
    for setting in dict.fromkeys(row.setting for row in rows):
        setting_rows = [row for row in rows if row.setting == setting]
        library = [row for row in setting_rows if row.provider == baseline]
        ours = min((row for row in setting_rows if row.provider != baseline), key=lambda row: row.ms.p50, default=None)
        if not library or ours is None:
            continue
        case, direction, precision, _, batch_size = setting
        rates = [significant(row.tflop_per_s) if row.tflop_per_s else "" for row in (library[0], ours)]
        fastest = f"{ours.provider}{marks(origins, [*library, ours])}"
        table.append(
            [f"{direction}, {precision}", case, str(batch_size), *rates, speedup("convolution", ours), fastest]
        )
    header = ["direction", "case", "batch", f"{baseline}, TFLOP/s", "conv3x3, TFLOP/s", "speed-up", "provider"]
    return markdown(header, table)


def markdown(header: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table without empty columns, text to the left and figures to the right."""
    kept = [i for i in range(len(header)) if any(line[i] for line in table)]
    sides = ["---" if header[i] in ("case", "provider", "category") or i == 0 else "---:" for i in kept]
    lines = [[header[i] for i in kept], sides, *([line[i] for i in kept] for line in table)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _categories(folder: Folder) -> list[str]:
    lines, parts = [], folder.parts
    for precision, batch_size in dict.fromkeys((part.precision, part.batch_size) for part in parts):
        chosen = {
            (part.category, part.provider): part.ms
            for part in parts
            if (part.precision, part.batch_size) == (precision, batch_size)
        }
        providers = list(dict.fromkeys(provider for _, provider in chosen))
        what = ", ".join(filter(None, [precision, batch_size and f"batch {batch_size}"])) or "category"
        table = [
            [category, *(significant(chosen.get((category, provider), 0.0)) for provider in providers)]
            for category in dict.fromkeys(category for category, _ in chosen)
        ]
        sums = [sum(ms for (_, name), ms in chosen.items() if name == provider) for provider in providers]
        table.append(["sum", *map(significant, sums)])
        lines += [*markdown([what, *providers], table), ""]
    return lines[:-1]


def page_tables(folder: Folder, page: Path) -> str:
    """Return the page's text between the device's markers.

    Raises:
        ValueError: the folder has no rows that the page shows.
    """
    networks = {level: folder.rows[level] for level in NETWORKS if level in folder.rows}
    operations = [
        row
        for row in folder.rows.get("op", [])
        if (row.direction, row.precision, row.layout) == ("both", "bf16", "channels_last")
    ]
    if not (networks or operations):
        raise ValueError(
            f"{page.name} shows {folder.path.name}, but its CSV files have neither a training step, nor inference, nor "
            "an operation forward and backward in bf16, channels_last"
        )
    shown = list(itertools.chain(*networks.values(), operations))
    origins = [origin for origin in folder.origins if any(row.origin == origin for row in shown)]
    lines: list[str] = []
    for level, rows in networks.items():
        lines += [*_page_networks(origins, level, rows), ""]
    if operations:
        lines += [*_page_operations(origins, operations), ""]
    if len(origins) > 1:
        lines += [f"<sup>{number}</sup> {origin};" for number, origin in enumerate(origins, 1)]
    else:
        lines.append(f"{origins[0]};")
    report_link = Path(os.path.relpath(folder.path / "report.md", page.parent)).as_posix()
    return "\n".join([*lines, f"`pytest benchmarks`; all rows are in [report.md]({report_link})."])


def _page_networks(origins: Sequence[Origin], level: str, rows: Sequence[Measurement]) -> list[str]:
    """Return a table with a line for each precision and provider, and a column for each batch size."""
    by_column = {(row.precision, row.provider, row.batch_size): row for row in rows}
    batch_sizes = sorted({row.batch_size for row in rows})

    def cell(row: Measurement | None) -> str:
        if row is None:
            return "–"
        figures = [f"{significant(row.ms.p50)} ms", speedup(level, row)]
        if level == "inference":
            figures.append(f"{row.images_per_s:,.0f} images/s")
        if row.of_floor:
            figures.append(percent(row.of_floor))
        return f"{', '.join(figures)}{marks(origins, [row])}"

    table = []
    for precision in dict.fromkeys(row.precision for row in rows):
        precision_rows = [row for row in rows if row.precision == precision]
        for i, name in enumerate(providers_of(level, precision_rows)):
            cells = [cell(by_column.get((precision, name, size))) for size in batch_sizes]
            table.append(["" if i else precision, name, *cells])
    baseline, speed = LEVELS[level].baseline, ", images/s" if level == "inference" else ""
    note = f"Median time of a {NETWORKS[level]}, speed-up over `{baseline}` "
    note += f"(20th – 80th percentile of paired rounds){speed}, % of floor."
    if any(row.provider == "eager" for row in rows):
        note += f"\n{UNTUNED}."
    header = [TITLES[level].lower(), "provider", *(f"batch {size}" for size in batch_sizes)]
    return [*markdown(header, table), "", note]


def _page_operations(origins: Sequence[Origin], rows: Sequence[Measurement]) -> list[str]:
    """Return a table over the stage shapes, with a line for each operation and batch size and a column per provider."""
    providers = providers_of("op", rows)

    def cell(group: Sequence[Measurement], n_shapes: int) -> str:
        if not group:
            return "–"
        speedups = [row.speedup.p50 for row in group]
        middle = f"{statistics.median(speedups):.2f}×"
        if group[0].provider == LEVELS["op"].baseline:
            middle = "1×"
        elif len(group) > 1:
            middle += f" ({min(speedups):.2f} – {max(speedups):.2f})"
        floors = [row.of_floor for row in group if row.of_floor]
        floor = f", {percent(statistics.median(floors))}" if floors else ""
        few = f", {len(group)} of {n_shapes} shapes" if len(group) < n_shapes else ""
        return f"{middle}{floor}{few}{marks(origins, group)}"

    table = []
    for key in dict.fromkeys((operation_and_shape(row.case)[0], row.batch_size) for row in rows):
        key_rows = [row for row in rows if (operation_and_shape(row.case)[0], row.batch_size) == key]
        n_shapes = len({row.case for row in key_rows})
        cells = [cell([row for row in key_rows if row.provider == name], n_shapes) for name in providers]
        table.append([f"{key[0]}, batch {key[1]}", *cells])
    note = f"Speed-up over `{LEVELS['op'].baseline}`, median over the stage shapes (least – most); median % of floor."
    return [*markdown(["operation, forward and backward, bf16, channels_last", *providers], table), "", note]


def operation_and_shape(case: str) -> tuple[str, str]:
    """Return the two parts of a case such as "BN+add+ReLU 64x32x32"."""
    match = re.search(r"^(.*?) (\d+x\d+x\d+)(.*)$", case)
    return (match[1] + match[3], match[2]) if match else (case, "")


def providers_of(level: str, rows: Iterable[Measurement]) -> list[str]:
    """Return the rows' providers in the level's order, then those that it does not know."""
    measured = dict.fromkeys(row.provider for row in rows)
    return [name for name in dict.fromkeys(itertools.chain(LEVELS[level].providers, measured)) if name in measured]


def significant(value: float) -> str:
    """Return a number with three digits, or all of the digits before the point."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{decimals}f}"


def speedup(level: str, row: Measurement) -> str:
    if row.provider == LEVELS[level].baseline:
        return "1×"
    return f"{row.speedup.p50:.2f}× ({row.speedup.p20:.2f} – {row.speedup.p80:.2f})"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"
