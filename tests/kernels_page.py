"""`python tests/kernels_page.py`: compiles every kernel for every target; writes docs/kernels.csv and docs/kernels.md.

Machine code that the file already holds, by its key, is not compiled again. `--check` prints as JSON what
test_compiled_kernels.py wants to know: which rows are missing or left over, and a sample of the rows, compiled afresh.
Run without TRITON_INTERPRET.
"""

import json
import sys
from collections import Counter

import triton
from compile_kernels import Compiled, Job, compile_all, jobs
from pages import DOCS, write_tables

from benchmarks.results import read_rows, write_rows

COLUMNS = (
    *("kernel", "dtype", "layout", "channels", "width", "join", "relu", "fork", "training", "ghost", "target"),
    *("registers", "stack", "shared", "loads", "stores", "instructions", "loop", "matrix", "dots"),
    *("images_read", "images_written", "n_tiles", "share", "in_flight", "bases", "offsets", "triton", "key"),
)
SHOWN = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")
# One in this many is compiled afresh in every test run: of the path most taken, and of the others.
SAMPLE_OF_MOST_TAKEN, SAMPLE = 6, 200

Row = dict[str, str]


def as_row(compiled: Compiled) -> Row:
    code = compiled.code
    values = (
        *(compiled.kernel, *compiled.operation, compiled.target),
        *(code.registers, code.stack, compiled.shared, widths(code.loads), widths(code.stores)),
        *(code.instructions, code.loop, code.matrix, compiled.dots),
        *(compiled.images_read, compiled.images_written, compiled.n_tiles, compiled.share),
        *("" if compiled.in_flight is None else compiled.in_flight, compiled.bases, compiled.offsets),
        *(triton.__version__, compiled.key),
    )
    return {column: str(value) for column, value in zip(COLUMNS, values, strict=True)}


def widths(counts: Counter[int]) -> str:
    """How many instructions of which width in bits: "128x7 8x1"."""
    return " ".join(f"{width}x{counts[width]}" for width in sorted(counts, reverse=True))


def read() -> dict[str, Row]:
    """The committed rows by their keys."""
    return {row["key"]: row for row in read_rows(DOCS / "kernels.csv", COLUMNS)}


def write() -> None:
    known, wanted = read(), jobs()
    missing = [job for job in wanted if job.key not in known]
    for done, compiled in enumerate(compile_all(missing), 1):
        known[compiled.key] = as_row(compiled)
        if done % 100 == 0:
            print(f"{done} of {len(missing)} compiled", flush=True)
    rows = [known[job.key] for job in wanted]
    write_rows(DOCS / "kernels.csv", rows)
    write_tables(DOCS / "kernels.md", tables(rows))


def is_most_taken(target: str, dtype: str, layout: str) -> bool:
    """Whether a GPU that the page shows trains like this: in bf16, the T4, which has none, in fp16."""
    return target in SHOWN and (dtype, layout) == ("fp16" if target == "sm_75" else "bf16", "channels_last")


def tables(rows: list[Row]) -> str:
    """What stands between the page's markers, from nothing but the rows of the CSV."""
    lines = [f"Compiled by triton {rows[0]['triton']}: {len(rows)} specializations."]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        lines += ["", f"### {kernel}", ""]
        lines += ["| target | type | registers | stack | shared | loads | stores | in flight | loop | instructions |"]
        lines += ["|---" * 10 + "|"]
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row["kernel"] == kernel and is_most_taken(row["target"], row["dtype"], row["layout"]):
                groups.setdefault((row["target"], row["dtype"]), []).append(row)
        for place, group in groups.items():
            cells = [
                *place,
                *(_range(group, column) for column in ("registers", "stack", "shared")),
                *(_widths(group, column) for column in ("loads", "stores")),
                *(_range(group, column) for column in ("in_flight", "loop", "instructions")),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _range(rows: list[Row], column: str) -> str:
    low, high = min(int(row[column]) for row in rows), max(int(row[column]) for row in rows)
    return f"{low}" if low == high else f"{low}–{high}"


def _widths(rows: list[Row], column: str) -> str:
    found = {int(access.split("x")[0]) for row in rows for access in row[column].split()}
    return ", ".join(str(width) for width in sorted(found, reverse=True))


def one_in(job: Job) -> int:
    most_taken = job.target == "sm_90" and is_most_taken(job.target, job.operation.dtype, job.operation.layout)
    return SAMPLE_OF_MOST_TAKEN if most_taken else SAMPLE


def check() -> None:
    known, wanted = read(), jobs()
    sample = [job for job in wanted if int(job.key, 16) % one_in(job) == 0]
    keys = {job.key for job in wanted}
    report = {
        "missing": sorted(keys - known.keys()),
        "left over": sorted(known.keys() - keys),
        "sample": [as_row(compiled) for compiled in compile_all(sample)],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    check() if "--check" in sys.argv[1:] else write()
