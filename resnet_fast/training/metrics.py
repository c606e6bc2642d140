"""The metrics of an epoch, and the result of a run."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from resnet_fast.training.config import TrainConfig


@dataclass(frozen=True)
class EpochMetrics:
    """One row of metrics.csv.

    Args:
        epoch: number of the epoch, from 1.
        lr: the learning rate of the epoch's last step.
        train_loss, train_accuracy: means over the epoch's augmented training images, while the weights change.
        test_loss, test_accuracy: means over the test images, or those held out of the training images, with the weights
            at the end of the epoch. Accuracies are in [0, 1].
        seconds: duration of the training alone, without evaluation and writing files.
        images_per_second: training images per second of that time.
        skipped_steps: number of steps skipped because their gradients overflowed in fp16.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float
    images_per_second: float
    skipped_steps: int = 0


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Args:
        config: the settings that were used.
        history: one entry per epoch.
        model: the trained model, in evaluation mode, on its device.
        seconds: duration of the run from the first step on, with evaluations and files; of a resumed run, the time up
            to its checkpoint plus the time since it resumed.
        mirrored_accuracy: accuracy of the mean logits of each image and its mirror image ("flip TTA"); None if a mirror
            image may show another class.
    """

    config: TrainConfig
    history: tuple[EpochMetrics, ...]
    model: nn.Module
    seconds: float
    mirrored_accuracy: float | None = None

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.config.out

    @property
    def test_accuracy(self) -> float:
        """Accuracy after the last epoch; to pick the best epoch would be to choose on the test images."""
        return self.history[-1].test_accuracy

    @property
    def train_seconds(self) -> float:
        """Duration of the training steps alone."""
        return sum(metrics.seconds for metrics in self.history)

    @property
    def images_per_second(self) -> float:
        """Training images per second of training."""
        images = sum(metrics.images_per_second * metrics.seconds for metrics in self.history)
        return images / self.train_seconds
