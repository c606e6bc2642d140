"""A run of a tiny network, trained by the command's code, for tests of later commands."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_in import stand_in
from torch import Tensor, nn
from typer.testing import CliRunner
from typer.testing import Result as CliResult

from resnet_fast.cli import app
from resnet_fast.ops import augment
from resnet_fast.training import MODELS, Result, TrainConfig, run_folder, train


class Tiny(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


def use_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "resnet18", stand_in(lambda *, num_classes, stem: Tiny(num_classes)))
    monkeypatch.setattr(augment, "choose_backend", lambda x: "aten")  # interpreted it takes longer than the training
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args: None)  # so do pictures
    monkeypatch.setattr(run_folder, "write_pictures", lambda *args: [])


def train_tiny(out: Path, **settings) -> Result:
    """Train for an epoch, in fp32, on a CPU."""
    defaults = dict(dataset="digits", epochs=1, batch_size=64, lr=0.05, device="cpu", precision="fp32", workers=0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny(monkeypatch)
        return train(TrainConfig(**{**defaults, "out": out, **settings}))


def make_image_folder(folder: Path, classes: Sequence[str] = ("ape", "bee", "cow"), n_train: int = 8) -> Path:
    """Write images of noise about a color for each class."""
    random = np.random.RandomState(0)
    for part, count in (("train", n_train), ("test", 3)):
        for i, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for j in range(count):
                pixels = random.randint(0, 100, (20, 30, 3)) + 150 * np.eye(3, dtype=int)[i % 3]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{j}.png")
    return folder


def invoke(*args: object) -> CliResult:
    """Run a command without a terminal."""
    return CliRunner().invoke(app, [str(arg) for arg in args])


def assert_is_plain(result: CliResult) -> None:
    """Nothing that moves a cursor, no traceback, and at most 80 columns but for the line that names the folder."""
    assert "\x1b" not in result.output and "\r" not in result.output and "Traceback" not in result.output
    long = [line for line in result.stdout.splitlines() if len(line) > 80]
    assert all("/" in line for line in long), long


def rewrite(path: Path, **changes: object) -> None:
    """Change entries of a checkpoint, None for none of it, and sign it again."""
    from resnet_fast.training.checkpoint import write_checkpoint

    state = {**torch.load(path, weights_only=True), **changes}
    write_checkpoint(
        path, {name: value for name, value in state.items() if value is not None and name != "format"}, None
    )
