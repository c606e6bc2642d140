"""What a data set is: two splits that hand out uint8 batches, and what is needed to normalize and augment them.

    dataset = load_dataset("digits")
    for images, labels in dataset.train.batches(32, generator):   # uint8 [32, 3, 32, 32], int64 [32]
        ...

A split keeps its images as bytes. Cropping, flipping and normalizing happen on the batch, on its device, in augment.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class DataError(RuntimeError):
    """A data set is missing, incomplete or damaged; the message says what to do about it."""


class Split(Protocol):
    """The training or the test part of a data set."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> "Split":
        """Return the split with its batches on `device`."""
        ...

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images uint8 [B, 3, H, W], labels int64 [B]), in the order of `batch_indices`."""
        ...


def batch_indices(n_images: int, batch_size: int, generator: torch.Generator | None) -> list[Tensor]:
    """Cut the images 0 … n_images - 1 into batches of indices.

    With a generator (training) the order is shuffled anew at each call, and a last batch of one single image is left
    out, because batch norm cannot take statistics over one value; which image that is changes with the order. Without
    a generator (evaluation) the order is fixed and every image is there.
    """
    if generator is None:
        return list(torch.arange(n_images).split(batch_size))
    batches = list(torch.randperm(n_images, generator=generator).split(batch_size))
    return batches[: training_steps(n_images, batch_size)]


def training_steps(n_images: int, batch_size: int) -> int:
    """Return how many batches of `batch_indices` an epoch of training has."""
    full, rest = divmod(n_images, batch_size)
    return full + (rest > 1)


@dataclass(frozen=True)
class TensorSplit:
    """A split held in memory.

    Args:
        images: [N, 3, H, W], uint8.
        labels: [N], int64.

    Raises:
        ValueError: images or labels have another shape or dtype.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3 or self.images.dtype != torch.uint8:
            got = f"{list(self.images.shape)}, {self.images.dtype}"
            raise ValueError(f"images must be [N, 3, H, W], torch.uint8, got {got}")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            got = f"{list(self.labels.shape)}, {self.labels.dtype}"
            raise ValueError(f"labels must be [{len(self.images)}], torch.int64, got {got}")

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "TensorSplit":
        return TensorSplit(self.images.to(device), self.labels.to(device))

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in batch_indices(len(self), batch_size, generator):
            indices = indices.to(self.images.device)
            yield self.images[indices], self.labels[indices]


@dataclass(frozen=True)
class ImageDataset:
    """A data set for image classification.

    Args:
        name: what `--dataset` calls it.
        classes: the name of each label.
        train, test: the two splits.
        mean, std: per channel, of the training images scaled to [0, 1].
        crop_padding: pixels of black that a random crop may shift in at each side; 0 for no crop.
        flip: whether a mirrored image still shows its class.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_padding: int
    flip: bool


def channel_statistics(images: Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and std of each channel of uint8 images [N, 3, H, W], scaled to [0, 1].

    Numerics: the 256 byte values are counted, and the moments are taken from the counts in fp64, so nothing is rounded
    however many images there are. The std is the biased one, as in the published constants of CIFAR-10.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(3):
        counts = torch.bincount(images[:, channel].flatten().int(), minlength=256).double()
        mean = float((counts * values).sum() / counts.sum())
        variance = float((counts * (values - mean) ** 2).sum() / counts.sum())
        means.append(mean)
        # A channel that never changes would divide by zero: half a grey level is below what bytes can tell apart.
        stds.append(max(variance**0.5, 0.5 / 255))
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])
