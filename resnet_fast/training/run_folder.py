"""The run folder: config.json, checkpoint.pt, metrics.csv and curves.png, each there as a whole or not at all.

From the second epoch on checkpoint-previous.pt is the checkpoint of the epoch before.
"""

import csv
import io
import json
import os
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from resnet_fast import __version__
from resnet_fast.data import ImageDataset
from resnet_fast.files import only_writer, whole_file
from resnet_fast.machine import device_name
from resnet_fast.training.checkpoint import write_checkpoint
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.curves import draw_curves
from resnet_fast.training.metrics import EpochMetrics

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"


def check_is_free(out: Path) -> None:
    """Raise FileExistsError unless `out` is an empty folder or not there."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise FileExistsError(f"out must be a folder, {out} is a file")
    names = sorted(path.name for path in out.iterdir())
    if names:
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise FileExistsError(f"out must be a new or an empty folder, {out} already holds {shown}; name another one")


class RunFolder:
    """Writes the files of one run.

    Args:
        config: names the folder.
        dataset: what is trained on, for config.json, the checkpoint and the axes.
        keep: whether the checkpoint that is there is kept as the previous one when the next is written.
    """

    def __init__(self, config: TrainConfig, dataset: ImageDataset, keep: bool = True) -> None:
        self.config, self.dataset, self.keep = config, dataset, keep

    def start(self) -> None:
        """Make the folder and write config.json.

        Raises:
            FileExistsError: the folder holds something already.
        """
        check_is_free(self.config.out)
        self.config.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(describe(self.config, self.dataset), indent=2, ensure_ascii=False) + "\n"
        with whole_file(self.config.out / "config.json") as file:
            file.write(text.encode())

    def hold(self) -> AbstractContextManager[None]:
        """Keep other processes out until the end of the block; raises BlockingIOError if one is there."""
        return only_writer(self.config.out)

    def clean(self) -> None:
        """Delete what a killed process left unfinished."""
        for name in ("config.json", CHECKPOINT, PREVIOUS, "metrics.csv", "curves.png"):
            for path in self.config.out.glob(f".{name}.*.tmp"):
                path.unlink(missing_ok=True)

    def write_epoch(self, history: Sequence[EpochMetrics], state: dict[str, Any]) -> None:
        """Replace the checkpoint, the table and the curves by those of the last epoch of `history`."""
        checkpoint = {
            **state,
            "epoch": history[-1].epoch,
            "history": [asdict(metrics) for metrics in history],
            "config": {**self.config.as_dict(), "flip": self.dataset.flip},
            "classes": list(self.dataset.classes),
            # With these a checkpoint alone says what to do with an image.
            "mean": list(self.dataset.mean),
            "std": list(self.dataset.std),
            "image_size": self.config.image_size if self.config.dataset == "folder" else 32,
        }
        write_checkpoint(self.config.out / CHECKPOINT, checkpoint, self.config.out / PREVIOUS if self.keep else None)
        self.keep = True
        self.write_tables(history)

    def write_tables(self, history: Sequence[EpochMetrics]) -> None:
        """Replace the table and the curves."""
        with whole_file(self.config.out / "metrics.csv") as file:
            file.write(_table(history).encode())
        title = f"{self.config.model} ({self.config.stem} stem) on {self.config.dataset}"
        with whole_file(self.config.out / "curves.png") as file:
            draw_curves(file, history, title, self.config.epochs, len(self.dataset.test))


def describe(config: TrainConfig, dataset: ImageDataset) -> dict[str, Any]:
    """Return what config.json holds."""
    device = torch.device(config.device)
    return {
        **config.as_dict(),
        "flip": dataset.flip,
        "crop_padding": dataset.crop_padding,
        "mean": dataset.mean,
        "std": dataset.std,
        "classes": dataset.classes,
        "train_images": len(dataset.train),
        "test_images": len(dataset.test),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": metadata.version("torchvision"),
            "resnet_fast": __version__,
        },
        "threads": torch.get_num_threads(),
        "device_name": device_name(device),
    }


def _table(history: Sequence[EpochMetrics]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(EpochMetrics)], lineterminator="\n")
    writer.writeheader()
    for metrics in history:
        writer.writerow({name: f"{value:.6g}" for name, value in asdict(metrics).items()})
    return text.getvalue()
