"""The run folder: config.json, checkpoint.pt, metrics.csv and curves.png, each either complete or absent.

From the second epoch on, checkpoint-previous.pt is the checkpoint of the epoch before. After the last epoch,
confusion.png and mistakes.png are drawn. With `tensorboard`, there is a folder of event files.
"""

import csv
import io
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from importlib import metadata
from typing import Any

import torch

from resnet_fast._version import __version__
from resnet_fast.common.files import PATIENCE, delete_unfinished, only_writer, whole_file
from resnet_fast.common.machine import device_name
from resnet_fast.data import Augmentation, ImageDataset
from resnet_fast.evaluation import Predictions, write_pictures
from resnet_fast.training.checkpoint import write_checkpoint
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.curves import draw_curves
from resnet_fast.training.metrics import EpochMetrics
from resnet_fast.training.paths import CHECKPOINT, PREVIOUS, check_is_free
from resnet_fast.training.tensorboard import TensorBoard

# Seconds. Drawing takes half a second, as long as an epoch of CIFAR-10 should take on a large GPU.
DRAW_EVERY = 30


class RunFolder:
    """Writes the files of one run.

    Args:
        config: the settings of the run; `out` is the folder.
        dataset: the data set, described in config.json, the checkpoint and the pictures.
        augmentation: the augmentation of its images.
        keep: whether to keep the existing checkpoint as the previous one when the next is written.
    """

    def __init__(
        self, config: TrainConfig, dataset: ImageDataset, augmentation: Augmentation, keep: bool = True
    ) -> None:
        self.config, self.dataset, self.augmentation, self.keep = config, dataset, augmentation, keep
        self.drawn = -math.inf  # when the curves were drawn last
        self.board: TensorBoard | None = None

    def start(self, weights_sha256: str | None = None) -> None:
        """Write config.json, the first file, into the folder that `hold` made.

        Args:
            weights_sha256: digest of the file of initial weights; None if they are new.

        Raises:
            FileExistsError: the folder is not empty.
        """
        check_is_free(self.config.out)
        values = run_settings(self.config, self.dataset, self.augmentation)
        if weights_sha256 is not None:
            values["weights_sha256"] = weights_sha256
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        with whole_file(self.config.out / "config.json") as file:
            file.write(text.encode())

    @contextmanager
    def hold(self, is_new: bool = False) -> Iterator[None]:
        """Lock the folder against other processes until the end of the block.

        Args:
            is_new: whether the run is new: make the folder, and do not wait for another process that holds it.

        Raises:
            FileExistsError: `is_new`, and another process holds the folder.
            BlockingIOError: not `is_new`, and another process holds the folder.
        """
        out = self.config.out
        with ExitStack() as stack:
            if is_new:
                out.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(only_writer(out, patience=0 if is_new else PATIENCE))
            except BlockingIOError as error:
                if not is_new:
                    raise
                raise FileExistsError(f"out must be a folder of its own, {error}; name another one") from None
            try:
                yield
            finally:
                if self.board is not None:
                    self.board.close()

    def clean(self) -> None:
        """Delete what a killed process left unfinished."""
        for name in ("config.json", CHECKPOINT, PREVIOUS, "metrics.csv", "curves.png", "confusion.png", "mistakes.png"):
            delete_unfinished(self.config.out / name)

    def write_epoch(self, history: Sequence[EpochMetrics], state: dict[str, Any]) -> None:
        """Write checkpoint, table, curves and TensorBoard events after the last epoch of `history`."""
        checkpoint = {
            **state,
            "epoch": history[-1].epoch,
            "history": [asdict(metrics) for metrics in history],
            "config": {**self.config.as_dict(), "crop": self.augmentation.crop},  # as in config.json
            "classes": list(self.dataset.classes),
            # With these, a checkpoint alone suffices to classify an image.
            "mean": list(self.augmentation.mean),
            "std": list(self.augmentation.std),
            "image_size": self.dataset.test.size[0],
        }
        write_checkpoint(self.config.out / CHECKPOINT, checkpoint, self.config.out / PREVIOUS if self.keep else None)
        self.keep = True
        self.write_tables(history)
        if self.config.tensorboard:
            self.board = self.board or TensorBoard(self.config.out, self.config.as_dict(), history[:-1])
            self.board.write(history[-1])

    def write_tables(self, history: Sequence[EpochMetrics], is_last: bool = False) -> None:
        """Write the table and, after the last epoch or if they are older than DRAW_EVERY, the curves."""
        with whole_file(self.config.out / "metrics.csv") as file:
            file.write(_table(history, self.config).encode())
        is_last = is_last or len(history) == self.config.epochs
        if not is_last and time.monotonic() - self.drawn < DRAW_EVERY:
            return
        self.drawn = time.monotonic()
        kind = "validation" if self.config.holdout else "test"
        with whole_file(self.config.out / "curves.png") as file:
            n_test, augmented = len(self.dataset.test), not self.augmentation.changes_nothing
            draw_curves(file, history, self.title, self.config.epochs, n_test, kind, augmented)

    def write_end(self, predictions: Predictions) -> None:
        """Write confusion.png and mistakes.png from the trained network's predictions of the test images."""
        kind = "validation" if self.config.holdout else "test"
        write_pictures(self.config.out, predictions, self.dataset.classes, f"{self.title}, {kind} images")

    @property
    def title(self) -> str:
        """Title of the pictures: the network and the data set."""
        return f"{self.config.model} ({self.config.stem} stem) on {self.config.dataset}"


def run_settings(config: TrainConfig, dataset: ImageDataset, augmentation: Augmentation) -> dict[str, Any]:
    """Return the contents of config.json."""
    device = torch.device(config.device)
    return {
        **config.as_dict(),
        "crop": augmentation.crop,
        "mean": augmentation.mean,
        "std": augmentation.std,
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


def _table(history: Sequence[EpochMetrics], config: TrainConfig) -> str:
    text = io.StringIO()
    # Scores on held-out training images are named val_, not test_.
    names = {f.name: f.name.replace("test_", "val_") if config.holdout else f.name for f in fields(EpochMetrics)}
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names.values())
    for metrics in history:
        writer.writerow([f"{getattr(metrics, name):.6g}" for name in names])
    return text.getvalue()
