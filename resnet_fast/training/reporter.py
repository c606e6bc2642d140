"""The interface through which a run reports its progress."""

from collections.abc import Sequence
from typing import NamedTuple

from resnet_fast.data import ImageDataset
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.metrics import EpochMetrics


class EpochProgress(NamedTuple):
    """The scores and the speed of an epoch's steps so far.

    Args:
        loss, accuracy: means over the augmented images of these steps.
        images_per_second: training images per second, of all processes together.
    """

    loss: float
    accuracy: float
    images_per_second: float


class Reporter:
    """A base class whose methods a run calls as it proceeds. They do nothing here; override those that you need."""

    def note(self, line: str) -> None:
        """Called before `start`, with a line about the run, such as the origin of its initial weights."""

    def start(self, config: TrainConfig, dataset: ImageDataset) -> None:
        """Called when the data are loaded, before training begins."""

    def resume(self, history: Sequence[EpochMetrics]) -> None:
        """Called after `start` if the run is resumed, with its finished epochs, which may be none or all."""

    def start_epoch(self, epoch: int, n_steps: int) -> None:
        """Called before an epoch of `n_steps` steps; the first is epoch 1."""

    def step(self, done: int, progress: EpochProgress | None) -> None:
        """Called after each step, with the number of steps done; `progress` is None unless losses were just read."""

    def end_epoch(self, metrics: EpochMetrics) -> None:
        """Called when an epoch's files are written; the next epoch may have begun, but has written nothing yet."""
