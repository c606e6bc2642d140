"""What is told how a run goes."""

from collections.abc import Sequence
from typing import NamedTuple

from resnet_fast.data import ImageDataset
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.metrics import EpochMetrics


class EpochProgress(NamedTuple):
    """Of the steps of an epoch that are done.

    Args:
        loss, accuracy: means over their augmented images.
        images_per_second: of all processes together.
    """

    loss: float
    accuracy: float
    images_per_second: float


class Reporter:
    """Is told how a run goes. This one says nothing; the terminal output derives from it."""

    def note(self, line: str) -> None:
        """Before `start`: a line about the run, such as the origin of its first weights."""

    def start(self, config: TrainConfig, dataset: ImageDataset) -> None:
        """The data are loaded; training begins."""

    def resume(self, history: Sequence[EpochMetrics]) -> None:
        """After `start`, if the run goes on from a checkpoint: the epochs that are done, which may be none or all."""

    def start_epoch(self, epoch: int, n_steps: int) -> None:
        """An epoch of `n_steps` steps begins; the first is epoch 1."""

    def step(self, done: int, progress: EpochProgress | None) -> None:
        """`done` steps of the epoch are done; now and then it is known how they went."""

    def end_epoch(self, metrics: EpochMetrics) -> None:
        """The epoch is trained, tested and written; the next one may have begun, but writes nothing yet."""
