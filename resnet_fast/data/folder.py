"""A folder of images: FOLDER/train/<class>/… and FOLDER/test/<class>/…, in any format that Pillow reads.

Images are read and resized by worker processes as they are needed, so the set may be larger than memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from resnet_fast.data.dataset import DataError, ImageDataset, batch_indices, channel_statistics

STATISTICS_IMAGES = 2048  # enough for mean and std to three digits; reading all of a large folder would take minutes


def load_folder(folder: Path, image_size: int = 32, workers: int = 0) -> ImageDataset:
    """Return the images of `folder`, resized to image_size x image_size (the aspect ratio is not kept).

    Augmentation: a crop with a shift of up to an eighth of the size (4 pixels at 32, as for CIFAR-10) and a flip.
    Mean and std are measured on at most 2,048 evenly spaced training images.

    Raises:
        DataError: the folder, its train/ or its test/ is missing or has no images, the classes of train/ and test/
            differ, there is only one class, or an image cannot be read.
    """
    layout = f"expected {folder}/train/<class>/<image> and {folder}/test/<class>/<image>"
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist; {layout}")
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise DataError(f"the data folder {folder} has no {part}/; {layout}")
    train, test = _list_images(folder / "train", layout), _list_images(folder / "test", layout)
    if train.classes != test.classes:
        only_train = sorted(set(train.classes) - set(test.classes))
        only_test = sorted(set(test.classes) - set(train.classes))
        found = [f"only in train/: {', '.join(only_train)}"] if only_train else []
        found += [f"only in test/: {', '.join(only_test)}"] if only_test else []
        raise DataError(f"train/ and test/ of {folder} must hold the same classes; {'; '.join(found)}")
    if len(train.classes) < 2:
        raise DataError(f"a classifier needs at least 2 classes, {folder / 'train'} has only {train.classes[0]}")

    train_split, test_split = (FolderSplit(_Images(part.samples, image_size), workers) for part in (train, test))
    mean, std = _statistics(train_split)
    return ImageDataset(
        name="folder",
        classes=tuple(train.classes),
        train=train_split,
        test=test_split,
        mean=mean,
        std=std,
        crop_padding=image_size // 8,
        flip=True,
    )


def _list_images(folder: Path, layout: str) -> ImageFolder:
    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:  # no class folder, or a class folder without an image
        raise DataError(f"no images to use in {folder}: {error}; {layout}") from error


def _statistics(split: "FolderSplit") -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    spaced = np.linspace(0, len(split) - 1, min(len(split), STATISTICS_IMAGES)).round().astype(int)
    chosen = FolderSplit(_Images([split.images.samples[i] for i in spaced], split.images.image_size), split.workers)
    return channel_statistics(torch.cat([images for images, _ in chosen.batches(64)]))


@dataclass(frozen=True)
class _Unreadable:
    """Stands for an image that failed: an exception would come out of a worker buried in that worker's traceback."""

    path: str
    reason: str


@dataclass(frozen=True)
class _Images(Dataset):
    samples: list[tuple[str, int]]
    image_size: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | _Unreadable:
        path, label = self.samples[index]
        try:
            with Image.open(path) as image:
                size = (self.image_size, self.image_size)
                pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error …
            return _Unreadable(path, str(error) or type(error).__name__)
        return torch.from_numpy(pixels).permute(2, 0, 1), label


def _collate(samples: list[tuple[Tensor, int] | _Unreadable]) -> tuple[Tensor, Tensor] | _Unreadable:
    images, labels = [], []
    for sample in samples:
        if isinstance(sample, _Unreadable):
            return sample
        images.append(sample[0])
        labels.append(sample[1])
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


@dataclass(frozen=True)
class FolderSplit:
    """A split read from files by `workers` processes (0: by this one)."""

    images: _Images
    workers: int
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "FolderSplit":
        return FolderSplit(self.images, self.workers, device)

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        # The order is drawn here and not by the loader: it depends on the generator alone, not on the workers.
        indices = [batch.tolist() for batch in batch_indices(len(self), batch_size, generator)]
        loader = DataLoader(
            self.images,
            batch_sampler=indices,  # type: ignore[arg-type]  # any iterable of lists will do
            num_workers=min(self.workers, len(indices)),
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        for batch in loader:
            if isinstance(batch, _Unreadable):
                raise DataError(f"cannot read the image {batch.path}: {batch.reason}")
            images, labels = batch
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
