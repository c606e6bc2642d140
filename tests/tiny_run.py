"""A run so small that it can be stopped, killed and resumed by the dozen: a tiny network on random images."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from stand_in import stand_in
from torch import Tensor, nn

from resnet_fast.data import ImageDataset, TensorSplit
from resnet_fast.ops import augment
from resnet_fast.training import EpochMetrics, Reporter, TrainConfig, network, prepare, run_folder, train

EPOCHS = 3


class Tiny(nn.Module):
    """Batch norm for buffers, and every global random state for the next weights to depend on."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Linear(4, num_classes)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.bn(self.conv(x)).relu().mean((2, 3)))
        return self.fc(y) * (1 + 0.1 * random.random() + 0.1 * np.random.rand() if self.training else 1)


def make_dataset(n_train: int = 41) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> TensorSplit:
        images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
        return TensorSplit(images, torch.randint(0, 3, (count,), generator=generator))

    return ImageDataset("digits", ("a", "b", "c"), split(n_train), split(19), (0.5,) * 3, (0.2,) * 3, 2, True)


class Stop(Reporter):
    """Raises an exception at a step of an epoch; 0 is before the first."""

    def __init__(self, epoch: int, step: int = 0) -> None:
        self.at, self.epoch = (epoch, step), 0

    def start_epoch(self, epoch: int, n_steps: int) -> None:
        self.epoch = epoch
        self.step(0, None)

    def step(self, done: int, progress: object) -> None:
        if (self.epoch, done) == self.at:
            raise KeyboardInterrupt


def use_tiny(set_attribute: Callable[[object, str, object], None]) -> None:
    """Put a small network and few images in place of the real ones, and a list in place of the curves."""
    set_attribute(network, "MODELS", {"resnet18": stand_in(lambda *, num_classes, stem: Tiny(num_classes))})
    set_attribute(augment, "choose_backend", lambda x: "aten")  # an interpreted kernel takes longer than an epoch
    set_attribute(prepare, "load_dataset", lambda *args, **kwargs: make_dataset())
    # A picture takes longer than an epoch.
    set_attribute(run_folder, "draw_curves", list_curves)
    set_attribute(run_folder, "write_pictures", lambda *args: None)


def list_curves(file: BinaryIO, history: Sequence[EpochMetrics], *rest: object) -> None:
    file.write(f"{without_times(history)} {rest}".encode())


def config_for(out: Path, **settings) -> TrainConfig:
    defaults = {"dataset": "digits", "epochs": EPOCHS, "batch_size": 8, "device": "cpu", "precision": "fp32"}
    return TrainConfig(**{**defaults, "out": out, **settings})


def stop(out: Path, epoch: int, step: int = 0, **settings) -> Path:
    """Start a run and stop it there."""
    with pytest.raises(KeyboardInterrupt):
        train(config_for(out, **settings), Stop(epoch, step))
    return out


def same_bits(out: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same weights, momentum, generators and, but for times, metrics."""
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (out, other)]
    for state in states:
        del state["seconds"], state["config"]["out"]
        for metrics in state["history"]:
            del metrics["seconds"], metrics["images_per_second"]
    return equal(*states)


def equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def without_times(history: Sequence[EpochMetrics]) -> list[EpochMetrics]:
    return [replace(metrics, seconds=0, images_per_second=0) for metrics in history]
