"""What is known about an epoch, and what a run returns."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from resnet_fast.training.config import TrainConfig


@dataclass(frozen=True)
class EpochMetrics:
    """One row of metrics.csv.

    Args:
        epoch: from 1.
        lr: the learning rate of the epoch's last step.
        train_loss, train_accuracy: means over the epoch's augmented training images, while the weights change.
        test_loss, test_accuracy: of the weights at the end of the epoch, on all test images, or on those that were held
            out of the training images; accuracies in 0 … 1.
        seconds: of training alone, without the evaluation and without writing files.
        images_per_second: training images in that time.
        skipped_steps: of the epoch, because their gradients overflowed in fp16.
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
    """What `train` returns.

    Args:
        config: the settings that were used.
        history: one entry per epoch.
        model: the trained model, in evaluation mode, on its device.
        seconds: of the whole run from the first step on, evaluations and files included; of a resumed run, up to the
            checkpoint that it went on from and since.
        mirrored_accuracy: of the mean of the logits of each image and of its mirror image ("flip TTA"); None where a
            mirrored image may show another class.
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
        """Of the last epoch: the best of all epochs would have been chosen on the test images."""
        return self.history[-1].test_accuracy

    @property
    def train_seconds(self) -> float:
        """Of the training steps alone."""
        return sum(metrics.seconds for metrics in self.history)

    @property
    def images_per_second(self) -> float:
        """Training images per second of training."""
        images = sum(metrics.images_per_second * metrics.seconds for metrics in self.history)
        return images / self.train_seconds
