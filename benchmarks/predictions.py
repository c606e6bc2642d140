"""Predicted times of benchmarks/predicted/<gpu>.csv next to measured ones, for the report of a GPU of the model."""

from collections.abc import Sequence
from functools import cache

from benchmarks.bench_op import OPERATIONS
from benchmarks.measured import Measurement
from benchmarks.predict import PREDICTED
from benchmarks.results import read_csv
from benchmarks.speed_model.gpus import GPUS


@cache
def _rows(device: str) -> list[dict[str, str]]:
    """Return the predicted rows of the GPU of that name; none if the model does not know it."""
    for name, gpu in GPUS.items():
        if gpu.name in device and (path := PREDICTED / f"{name}.csv").exists():
            return read_csv(path)
    return []


def predicted_us(row: Measurement) -> float | None:
    """Return the predicted time of the operation's kernels or None; like the measured time, it excludes launches."""
    case, _, shape = row.case.rpartition(" ")
    if row.provider != "fused" or row.layout != "channels_last" or case not in OPERATIONS:
        return None
    join, fork = OPERATIONS[case]
    times: dict[tuple[str, str], float] = {}  # by direction and kernel; a fork changes only the backward
    for predicted in _rows(row.origin.device):
        is_shape = f"{predicted['channels']}x{predicted['width']}x{predicted['width']}" == shape
        is_operation = predicted["join"] == join and (
            predicted["direction"] == "forward" or predicted["fork"] == ("yes" if fork else "no")
        )
        is_setting = (predicted["precision"], int(predicted["batch_size"])) == (row.precision, row.batch_size)
        if is_shape and is_operation and is_setting and row.direction in ("both", predicted["direction"]):
            us = float(predicted["predicted_us"]) * int(predicted["launches"])
            times[predicted["direction"], predicted["kernel"]] = us
    directions = {direction for direction, _ in times}
    return sum(times.values()) if directions >= _directions(row.direction) else None


def beside_measured(rows: Sequence[Measurement]) -> list[str]:
    """Return the lines of a table; none if nothing is predicted."""
    pairs = [(row, us) for row in rows if (us := predicted_us(row)) is not None]
    if not pairs:
        return []
    lines = ["", "Measured and [predicted](../../predicted/README.md) times:", ""]
    lines += [
        "| case | batch | measured, us | predicted, us | measured / predicted |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row, us in pairs:
        measured = 1000 * row.ms.p50
        lines.append(f"| {row.case} | {row.batch_size} | {measured:.1f} | {us:.1f} | {measured / us:.2f} |")
    return lines


def _directions(direction: str) -> set[str]:
    return {"forward", "backward"} if direction == "both" else {direction}
