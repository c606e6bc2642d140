"""A folder of images: FOLDER/train/<class>/… and FOLDER/test/<class>/…, in any format that Pillow reads.

Images are read and resized by worker processes: once where all of them fit in memory as bytes, else as they are needed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from resnet_fast.data.dataset import Batch, DataError, ImageDataset, Split, TensorSplit, channel_statistics

READ_TOGETHER = 256  # images to a message of a worker, when all are read
MEMORY_BUDGET = 2 * 2**30  # bytes of images that a CPU keeps
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
    spaced = torch.linspace(0, len(split) - 1, min(len(split), STATISTICS_IMAGES)).round().long()
    return channel_statistics(torch.cat([images for images, _ in split.subset(spaced).batches(64)]))


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
    return torch.stack(images).contiguous(memory_format=torch.channels_last), torch.tensor(labels, dtype=torch.int64)


@dataclass(frozen=True)
class FolderSplit:
    """A split read from files by `workers` processes (0: by this one), again each time."""

    images: _Images
    workers: int
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        return self.images.image_size, self.images.image_size

    def to(self, device: torch.device, images: str = "auto") -> Split:
        if images == "memory" or (images == "auto" and self.fits(device)):
            return self._in_memory().to(device)
        return FolderSplit(self.images, self.workers, device)

    def subset(self, indices: Tensor) -> "FolderSplit":
        samples = [self.images.samples[i] for i in indices.tolist()]
        return FolderSplit(_Images(samples, self.images.image_size), self.workers, self.device)

    def _in_memory(self) -> TensorSplit:
        images, labels = zip(*FolderSplit(self.images, self.workers).batches(READ_TOGETHER), strict=True)
        return TensorSplit(torch.cat(images), torch.cat(labels))

    def fits(self, device: torch.device) -> bool:
        """Whether all images, as bytes, take a small part of the memory of `device`."""
        budget = MEMORY_BUDGET
        if device.type == "cuda":
            budget = torch.cuda.mem_get_info(device)[0] // 4
        return 3 * self.images.image_size**2 * len(self) <= budget

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._read(list(torch.arange(len(self)).split(batch_size)))

    def planned(self, plan: Tensor, sizes: Sequence[int]) -> Iterator[Batch]:
        parts = plan.split(list(sizes))
        for rows, (images, labels) in zip(parts, self._read([rows[:, 0] for rows in parts]), strict=True):
            rows = rows.clone()
            rows[:, 0] = torch.arange(len(rows))  # of this batch's images
            yield Batch(images, labels, rows.to(self.device, non_blocking=True))

    def _read(self, parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and labels of each part, [B] indices."""
        # The order is given and not drawn by the loader: it does not depend on the workers.
        loader = DataLoader(
            self.images,
            batch_sampler=[part.tolist() for part in parts],  # type: ignore[arg-type]  # any iterable of lists will do
            num_workers=min(self.workers, len(parts)),
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        for batch in loader:
            if isinstance(batch, _Unreadable):
                raise DataError(f"cannot read the image {batch.path}: {batch.reason}")
            images, labels = batch
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
