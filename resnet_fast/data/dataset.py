"""Data sets: two splits that yield uint8 batches, and the statistics and settings to normalize and augment them.

    dataset = load_dataset("digits")
    for images, labels in dataset.test.batches(32):   # uint8 [32, 3, 32, 32], int64 [32], in order
        ...
    for batch in dataset.train.planned(plan, sizes):  # shuffled: see loader.py
        images, labels = batch.augmented(augmentation)

A split keeps its images as bytes. Each batch is cropped, flipped and normalized on its device.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from resnet_fast.common.checks import check_type, is_integer, shown
from resnet_fast.data.augment import Augmentation, normalize, seeded
from resnet_fast.data.draws import ERASED, MIXED, N_COLUMNS, TRIVIAL
from resnet_fast.ops.augment import N_DRAWS, augment
from resnet_fast.ops.regions import Mixture, erase, mix
from resnet_fast.ops.trivial_augment import trivial_augment

# A constant channel would divide by zero. Half a gray level is below the resolution of bytes.
LEAST_STD = 0.5 / 255
HOLDOUT_SEED = 0  # --seed must not change which images are held out
AS_BYTES = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # mean and std that leave the values 0 … 255


class DataError(RuntimeError):
    """A data set is missing, incomplete or damaged; the message says what to do about it."""


def check_no_file(folder: Path) -> None:
    """Raise DataError if `folder`, or a folder above it, exists but is not a folder."""
    for path in (folder, *folder.parents):
        if path.is_dir():
            return
        if os.path.lexists(path):
            kind = "a file" if path.is_file() else "a special file" if path.exists() else "a broken link"
            raise DataError(f"{path} must be a folder of data, but is {kind}")


class Batch(NamedTuple):
    """A training batch before augmentation, on its device.

    Args:
        images: [N, 3, H, W], uint8, channels_last: the whole split, or only the images of this batch.
        labels: [N], int64.
        plan: [B, 6 or 17], int32: the rows of `augment.epoch_plan` for this batch; the first column indexes `images`.
        is_resident: whether images and labels are the whole split, as the same tensors in every batch.
    """

    images: Tensor
    labels: Tensor
    plan: Tensor
    is_resident: bool = False

    def augmented(self, augmentation: Augmentation, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return the augmented and normalized images, [B, 3, H, W] in `dtype`, channels_last, and the labels, [B].

        Raises:
            ValueError: the augmentation mixes images (use `mixed`), or the plan was drawn for another augmentation.
        """
        if augmentation.mixes:
            got = f"mixup {augmentation.mixup:g} and cutmix {augmentation.cutmix:g}"
            raise ValueError(f"mixup and cutmix must be 0, got {got}; use mixed(), which returns both labels")
        return self._augmented(augmentation, dtype)

    def mixed(
        self, augmentation: Augmentation, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Mixture | None]:
        """Return `augmented`'s images and labels, and the second labels and shares, None if nothing is mixed.

        Each image is mixed with the one before it in this batch, the first with the last. The loss is

            (share · cross_entropy(logits, labels) + (1 - share) · cross_entropy(logits, others)).mean()

        Raises:
            ValueError: the plan was drawn for another augmentation.
        """
        if not augmentation.mixes:
            return *self._augmented(augmentation, dtype), None
        images, labels = self._augmented(augmentation, torch.float32)  # so that each pixel is rounded only once
        images, mixture = mix(images, labels, self.plan[:, MIXED])
        return images.to(dtype=dtype, memory_format=torch.channels_last), labels, mixture

    def _augmented(self, augmentation: Augmentation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        plan, is_trivial = self.plan, augmentation.trivial_augment
        if augmentation.draws_more:
            if plan.shape[1:] != (N_COLUMNS,):
                raise ValueError(f"plan must be [B, {N_COLUMNS}] for this augmentation, got {list(plan.shape)}")
            plan = plan[:, :N_DRAWS]
        mean, std = AS_BYTES if is_trivial else (augmentation.mean, augmentation.std)
        images, labels = augment(
            self.images,
            self.labels,
            plan,
            mean,
            std,
            padding=augmentation.crop,
            reflect=augmentation.padding == "reflect",
            cutout=0 if is_trivial else augmentation.cutout,
            dtype=torch.float32 if is_trivial else dtype,
        )
        if is_trivial:
            images = trivial_augment(images, self.plan[:, TRIVIAL])
            images = normalize(images, augmentation.mean, augmentation.std)
            if augmentation.cutout:
                corners = plan[:, 4:6]
                images = erase(images, torch.cat([corners, torch.full_like(corners, augmentation.cutout)], 1))
            images = images.to(dtype)
        if augmentation.random_erasing:
            images = erase(images, self.plan[:, ERASED])
        return images, labels


@runtime_checkable
class Split(Protocol):
    """The training or test part of a data set."""

    def __len__(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        ...

    def to(self, device: torch.device, images: str = "auto") -> "Split":
        """Return the split with its batches on `device`.

        Args:
            device: device of the batches.
            images: for a split of image files: "memory" reads all images now and keeps them on `device`, "stream" reads
                each when it is needed, "auto" keeps them if they fit into a quarter of a GPU's free memory, or 2 GiB.
        """
        ...

    def subset(self, indices: Tensor) -> "Split":
        """Return a split of the images at `indices`, [n], int64."""
        ...

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images uint8 [B, 3, H, W], labels int64 [B]) of all images, in order."""
        ...

    def planned(self, plan: Tensor, sizes: Sequence[int]) -> Iterator[Batch]:
        """Yield a batch for each of `sizes`, from the next rows of `plan`, [sum of sizes, 6 or 17]."""
        ...


@dataclass(frozen=True)
class TensorSplit:
    """A split held in memory, on the device that trains.

    Args:
        images: [N, 3, H, W], uint8.
        labels: [N], int64.

    Raises:
        TypeError: images or labels is not a tensor.
        ValueError: images or labels has another shape or dtype.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        check_type("images", self.images, Tensor)
        check_type("labels", self.labels, Tensor)
        if self.images.ndim != 4 or self.images.shape[1] != 3 or self.images.dtype != torch.uint8:
            got = f"{list(self.images.shape)}, {self.images.dtype}"
            raise ValueError(f"images must be [N, 3, H, W], torch.uint8, got {got}")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            got = f"{list(self.labels.shape)}, {self.labels.dtype}"
            raise ValueError(f"labels must be [{len(self.images)}], torch.int64, got {got}")
        # The way to set a field of a frozen dataclass.
        object.__setattr__(self, "images", self.images.contiguous(memory_format=torch.channels_last))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[2], self.images.shape[3]

    def to(self, device: torch.device, images: str = "auto") -> "TensorSplit":
        return TensorSplit(self.images.to(device), self.labels.to(device))

    def subset(self, indices: Tensor) -> "TensorSplit":
        indices = indices.to(self.images.device)
        return TensorSplit(self.images[indices], self.labels[indices])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)

    def planned(self, plan: Tensor, sizes: Sequence[int]) -> Iterator[Batch]:
        if self.images.device.type == "cuda":
            plan = plan.pin_memory()
        for rows in plan.to(self.images.device, non_blocking=True).split(list(sizes)):
            yield Batch(self.images, self.labels, rows, is_resident=True)


@dataclass(frozen=True)
class ImageDataset:
    """A data set for image classification.

    Args:
        name: name for `--dataset`.
        classes: the name of each label.
        train, test: the two splits.
        mean, std: one value per channel, of the training images scaled to [0, 1].
        crop_padding: pixels by which a random crop may usefully extend beyond each edge; 0 for no crop.
        flip: whether a mirrored image still shows its class.
        notes: messages for the user about files that are left out and channels that hardly vary.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_padding: int
    flip: bool
    notes: tuple[str, ...] = ()

    def to(self, device: torch.device, images: str = "auto") -> "ImageDataset":
        """Return the data set with both splits moved by `Split.to`."""
        return replace(self, train=self.train.to(device, images), test=self.test.to(device, images))

    def hold_out(self, n_images: int) -> "ImageDataset":
        """Return the data set with `n_images` training images, always the same ones, as its test split.

        Raises:
            ValueError: n_images is not an integer of at least 1 that leaves at least 2 images to train on.
        """
        if not is_integer(n_images) or not 1 <= n_images <= len(self.train) - 2:
            most, got = len(self.train) - 2, shown(n_images)
            raise ValueError(f"holdout must be 1 to {most} of {len(self.train)} images, got {got}")
        order = torch.randperm(len(self.train), generator=seeded(HOLDOUT_SEED))
        held_out, train = order[:n_images].sort().values, order[n_images:].sort().values
        return replace(self, train=self.train.subset(train), test=self.train.subset(held_out))


def channel_statistics(images: Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and std of each channel of uint8 images [N, 3, H, W], scaled to [0, 1].

    Numerics: the moments are computed in fp64 from the counts of the 256 byte values, so the error does not grow with
    the number of images. The std is the biased one, as in the published constants of CIFAR-10.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(3):
        counts = torch.bincount(images[:, channel].flatten().int(), minlength=256).double()
        mean = float((counts * values).sum() / counts.sum())
        variance = float((counts * (values - mean) ** 2).sum() / counts.sum())
        means.append(mean)
        stds.append(max(variance**0.5, LEAST_STD))
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])
