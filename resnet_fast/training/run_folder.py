"""The run folder: config.json, checkpoint.pt, metrics.csv and curves.png, each there as a whole or not at all."""

import csv
import io
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from resnet_fast import __version__
from resnet_fast.data import ImageDataset
from resnet_fast.files import whole_file
from resnet_fast.machine import device_name
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.curves import draw_curves
from resnet_fast.training.metrics import EpochMetrics


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

    Raises:
        FileExistsError: the folder holds something already.
    """

    def __init__(self, config: TrainConfig, dataset: ImageDataset) -> None:
        self.config, self.dataset = config, dataset
        check_is_free(config.out)
        config.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_describe(config, dataset), indent=2, ensure_ascii=False) + "\n"
        with whole_file(config.out / "config.json") as file:
            file.write(text.encode())

    def write_epoch(self, history: Sequence[EpochMetrics], state: dict[str, Any]) -> None:
        """Replace the checkpoint, the table and the curves by those of the last epoch of `history`."""
        checkpoint = {
            **_to_cpu(state),
            "epoch": history[-1].epoch,
            "config": self.config.as_dict(),
            "classes": list(self.dataset.classes),
        }
        # In memory first: on a full disk torch.save reports a fault of its archive, a plain write the full disk.
        archive = io.BytesIO()
        torch.save(checkpoint, archive)
        with whole_file(self.config.out / "checkpoint.pt") as file:
            file.write(archive.getbuffer())
        with whole_file(self.config.out / "metrics.csv") as file:
            file.write(_table(history).encode())
        title = f"{self.config.model} ({self.config.stem} stem) on {self.config.dataset}"
        with whole_file(self.config.out / "curves.png") as file:
            draw_curves(file, history, title, self.config.epochs, len(self.dataset.test))


def _describe(config: TrainConfig, dataset: ImageDataset) -> dict[str, Any]:
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


def _to_cpu(state: Any) -> Any:
    """Move every tensor in nested dicts and lists, so that a checkpoint of a GPU loads on a machine without one."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: _to_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_to_cpu(value) for value in state)
    return state
