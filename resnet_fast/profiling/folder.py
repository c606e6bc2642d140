"""The files of a profile: profile.csv, profile.png and a Chrome trace per provider, each complete or absent."""

import csv
import gzip
import io
import shutil
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from resnet_fast._version import __version__
from resnet_fast.common.files import whole_file
from resnet_fast.common.machine import device_name, triton_version
from resnet_fast.profiling.picture import draw_bars
from resnet_fast.profiling.recording import Part, StepProfile, rest_of
from resnet_fast.training.config import TrainConfig


def write_files(out: Path, profiles: Sequence[StepProfile], config: TrainConfig) -> list[str]:
    """Write the files to the folder `out`, and return their names.

    Raises:
        OSError: the folder cannot be created, or a file cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(config.device)
    with whole_file(out / "profile.csv") as file:
        file.write(_table(profiles, config, device).encode())
    with whole_file(out / "profile.png") as file:
        title = f"One training step of {config.model}: {config.precision}, batch {config.batch_size}"
        draw_bars(file, profiles, title, device_name(device), rest_of(device))
    names = ["profile.csv", "profile.png"]
    for profile in profiles:
        names.append(f"{profile.provider}.trace.json.gz")
        _write_trace(out / names[-1], profile.trace)
    return names


def _table(profiles: Sequence[StepProfile], config: TrainConfig, device: torch.device) -> str:
    what = {
        "device": device_name(device),
        "cpu_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "resnet_fast": __version__,
        "date_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model": config.model,
        "stem": config.stem,
        "image_size": config.image_size,
        "batch_size": config.batch_size,
        "precision": config.precision,
    }
    text = io.StringIO()
    columns = ["provider", "category", "operator", "kernel", "ms_per_step", "calls_per_step", "unprofiled_step_ms"]
    writer = csv.DictWriter(text, [*columns, *what], lineterminator="\n")
    writer.writeheader()
    for profile in profiles:
        for part in profile.parts:
            writer.writerow({**_row(profile, part), **what})
    return text.getvalue()


def _row(profile: StepProfile, part: Part) -> dict[str, str]:
    return {
        "provider": profile.provider,
        "category": part.category,
        "operator": part.operator,
        "kernel": part.kernel,
        "ms_per_step": f"{part.ms:.6f}",
        "calls_per_step": f"{part.calls:g}",
        "unprofiled_step_ms": f"{profile.unprofiled_ms:.4f}",
    }


def _write_trace(path: Path, trace: torch.profiler.profile) -> None:
    with tempfile.TemporaryDirectory() as folder:  # the profiler writes to a path, not to an open file
        unpacked = Path(folder) / path.name.removesuffix(".gz")
        trace.export_chrome_trace(str(unpacked))
        with whole_file(path) as file, gzip.GzipFile("", "wb", fileobj=file) as packed, open(unpacked, "rb") as text:
            shutil.copyfileobj(text, packed)
