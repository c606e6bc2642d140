"""A folder of images: FOLDER/train/<class>/… and FOLDER/test/<class>/…, in any format that Pillow reads.

Worker processes read and resize the images: once if all images fit in memory as bytes, otherwise in every epoch, by
workers that persist between epochs. listing.py selects the image files; images.py reads one.
"""

import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resnet_fast.common.checks import check_integer, check_path, few
from resnet_fast.data.dataset import LEAST_STD, Batch, DataError, ImageDataset, Split, TensorSplit, channel_statistics
from resnet_fast.data.images import ImageError, read_pixels, without_warnings
from resnet_fast.data.listing import N_NAMED, PARTS, Listing, check_layout, list_images
from resnet_fast.data.options import MAX_IMAGE_SIZE

READ_TOGETHER = 256  # images that a worker returns at once, when all are read
MEMORY_BUDGET = 2 * 2**30  # bytes of images kept in a CPU's memory
STATISTICS_IMAGES = 2048  # enough for mean and std to three digits; reading all of a large folder would take minutes


def load_folder(
    folder: Path | str, image_size: int = 32, workers: int = 0, skip_unreadable: bool = False
) -> ImageDataset:
    """Return the images of `folder`, resized to image_size x image_size (the aspect ratio is not kept).

    Augmentation: crops shifted by up to an eighth of the size (4 pixels at 32, as for CIFAR-10), and flips. Mean and
    std are computed from at most 2,048 evenly spaced training images. The result's `notes` name files that are left out
    and channels that hardly vary.

    Args:
        folder: folder with train/ and test/.
        image_size: height and width in pixels, 1 … 1024.
        workers: number of processes that read; 0 for this process.
        skip_unreadable: whether to read every image once now, and leave out those that cannot be read. Otherwise the
            first of them, now or later, raises a DataError that names all.

    Raises:
        ValueError: folder is not a path, or image_size or workers is not an integer in its range.
        DataError: the folder, its train/ or its test/ is missing, a class has no image, the classes of train/ and test/
            differ, there is only one class, or an image cannot be read.
    """
    folder = check_path("folder", folder)
    check_integer("image_size", image_size, 1, MAX_IMAGE_SIZE + 1)
    check_integer("workers", workers, 0)
    check_layout(folder)
    train, test = (list_images(folder, part) for part in PARTS)
    if train.classes != test.classes:
        in_train, in_test = set(train.classes), set(test.classes)
        alone = (("train/", sorted(in_train - in_test)), ("test/", sorted(in_test - in_train)))
        reasons = [f"only in {part}: {few(names, N_NAMED)}" for part, names in alone if names]
        raise DataError(f"train/ and test/ of {folder} must hold the same classes; {'; '.join(reasons)}")
    if len(train.classes) < 2:
        raise DataError(f"a classifier needs at least 2 classes, {folder / 'train'} has only {''.join(train.classes)}")

    images, n_train = _Images([*train.samples, *test.samples], image_size), len(train.samples)
    unreadable = _find_unreadable(images, workers) if skip_unreadable else {}
    parts = [
        _Images([sample for i, sample in enumerate(images.samples) if i in part and i not in unreadable], image_size)
        for part in (range(n_train), range(n_train, len(images)))
    ]
    for name, part in zip(PARTS, parts, strict=True):
        lost = set(range(len(train.classes))) - {label for _, label in part.samples}
        if lost:
            names = few([f"{train.classes[label]}/" for label in sorted(lost)], N_NAMED)
            first = next(error for i, error in unreadable.items() if images.samples[i][1] in lost)
            raise DataError(f"no image can be read in {names} of {folder / name}: {first}")
    checked = replace(images, samples=parts[0].samples + parts[1].samples)
    train_split, test_split = (FolderSplit(part, checked, workers) for part in parts)
    mean, std = _statistics(train_split)
    return ImageDataset(
        name="folder",
        classes=train.classes,
        train=train_split,
        test=test_split,
        mean=mean,
        std=std,
        crop_padding=image_size // 8,
        flip=True,
        notes=tuple(_notes(folder, train, test, list(unreadable.values()), std)),
    )


def _notes(folder: Path, train: Listing, test: Listing, unreadable: list[str], std: tuple[float, ...]) -> Iterator[str]:
    """Yield a message for each reason why files are left out, and one for channels that hardly vary."""
    n_images = len(train.samples) + len(test.samples)
    n_files = n_images + sum(len(part.other_endings) + len(part.without_class) for part in (train, test))
    for files, total, reason in (
        (train.other_endings + test.other_endings, f"{n_files:,} files", "without an image's extension"),
        (train.without_class + test.without_class, f"{n_files:,} files", "not in a class folder"),
        (unreadable, f"{n_images:,} images", "unreadable"),
    ):
        if files:
            names = few([name.removeprefix(f"{folder}{os.sep}") for name in files], N_NAMED, "; ")
            yield f"{len(files):,} of {total} left out, {reason}: {names}"
    flat = [name for name, value in zip(("red", "green", "blue"), std, strict=True) if value <= LEAST_STD]
    if flat:
        yield (
            f"the training images hardly vary in {', '.join(flat)}: the standard deviation is below half a gray level "
            f"(0.5 / 255), which is used instead"
        )


def _statistics(split: "FolderSplit") -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    spaced = torch.linspace(0, len(split) - 1, min(len(split), STATISTICS_IMAGES)).round().long()
    return channel_statistics(torch.cat([images for images, _ in split.subset(spaced).batches(64)]))


@dataclass(frozen=True)
class _Images(Dataset):
    """Batches of images in files.

    Args:
        samples: path and label of each image.
        image_size: height and width, in pixels.
    """

    samples: list[tuple[str, int]]
    image_size: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor | None, Tensor, list[tuple[int, str]]]:
        """Return images, labels, and index and error of each unreadable image; the images are None if there is one.

        An exception raised here would arrive with a worker's traceback around it.
        """
        pixels, failures = [], []
        with without_warnings():
            for index in indices:
                try:
                    pixels.append(read_pixels(self.samples[index][0], self.image_size))
                except ImageError as error:
                    failures.append((index, str(error)))
        images = None if failures else torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)  # channels_last
        return images, torch.tensor([self.samples[index][1] for index in indices]), failures


class _Reader:
    """Reads batches of images in worker processes, which persist between complete passes and end with the reader.

    Args:
        images: the images to read.
        workers: number of processes; 0 for this process.
        pin_memory: whether to put batches into pinned memory.
    """

    def __init__(self, images: _Images, workers: int, pin_memory: bool = False) -> None:
        self.images, self.workers, self.pin_memory = images, workers, pin_memory
        self.idle: list[DataLoader] = []  # at most one, between passes
        # The garbage collector may end a loader's queues before the loader, which then waits for seconds.
        weakref.finalize(self, self.idle.clear).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _Reader, (self.images, self.workers, self.pin_memory)  # processes are not copied

    def read(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor | None, Tensor, list[tuple[int, str]]]]:
        """Yield `images[part]` for each part, [B] indices."""
        n_workers = min(self.workers, len(parts))
        # Removed from idle, so that a pass that overlaps with this one starts its own processes.
        loader = self.idle.pop() if self.idle else None
        if loader is None or loader.num_workers != n_workers:
            loader = DataLoader(
                self.images,
                batch_size=None,  # a part is a batch
                sampler=[],  # filled below, so the order does not depend on the workers
                num_workers=n_workers,
                pin_memory=self.pin_memory,
                persistent_workers=n_workers > 0,
                generator=torch.Generator(),  # else the loader draws from the global one
            )
        loader.sampler[:] = [part.tolist() for part in parts]  # type: ignore[index]
        yield from loader
        self.idle[:] = [loader]  # only after a complete pass: otherwise batches may still be on their way


def _find_unreadable(images: _Images, workers: int) -> dict[int, str]:
    """Read every image; return the index and the error of each that cannot be read."""
    parts = torch.arange(len(images)).split(READ_TOGETHER)
    tiny = _Reader(replace(images, image_size=1), workers)  # images are decoded in full all the same
    return {index: error for *_, failures in tiny.read(parts) for index, error in failures}


@dataclass(frozen=True)
class FolderSplit:
    """A split that reads its files in every pass, in processes that end with the split.

    Args:
        images: images of the split.
        checked: images of the whole data set, all of which are checked if one cannot be read.
        workers: number of processes; 0 for this process.
        device: device of the batches.
    """

    images: _Images
    checked: _Images
    workers: int
    device: torch.device = torch.device("cpu")
    reader: _Reader = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # The way to set a field of a frozen dataclass.
        object.__setattr__(self, "reader", _Reader(self.images, self.workers, self.device.type == "cuda"))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        return self.images.image_size, self.images.image_size

    def to(self, device: torch.device, images: str = "auto") -> Split:
        if images == "memory" or (images == "auto" and self.fits(device)):
            return self._in_memory().to(device)
        return replace(self, device=device)

    def subset(self, indices: Tensor) -> "FolderSplit":
        samples = [self.images.samples[i] for i in indices.tolist()]
        return replace(self, images=replace(self.images, samples=samples))

    def _in_memory(self) -> TensorSplit:
        on_cpu = replace(self, device=torch.device("cpu"))
        images, labels = zip(*on_cpu.batches(READ_TOGETHER), strict=True)
        return TensorSplit(torch.cat(images), torch.cat(labels))

    def fits(self, device: torch.device) -> bool:
        """Whether all images, as bytes, fit into a quarter of a GPU's free memory, or a CPU's `MEMORY_BUDGET`."""
        budget = MEMORY_BUDGET
        if device.type == "cuda":
            budget = torch.cuda.mem_get_info(device)[0] // 4
        return 3 * self.images.image_size**2 * len(self) <= budget

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._read(torch.arange(len(self)).split(batch_size))

    def planned(self, plan: Tensor, sizes: Sequence[int]) -> Iterator[Batch]:
        parts = plan.split(list(sizes))
        for rows, (images, labels) in zip(parts, self._read([rows[:, 0] for rows in parts]), strict=True):
            rows = rows.clone()
            rows[:, 0] = torch.arange(len(rows))  # indices into this batch's images
            yield Batch(images, labels, rows.to(self.device, non_blocking=True))

    def _read(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and labels of each part, [B] indices."""
        for images, labels, failures in self.reader.read(parts):
            if images is None:
                raise self._unreadable(failures)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _unreadable(self, failures: list[tuple[int, str]]) -> DataError:
        """Return the error that names all unreadable images of the data set."""
        errors = list(_find_unreadable(self.checked, self.workers).values())
        errors += [error for _, error in failures if error not in errors]  # the second read may succeed
        return DataError(
            f"{len(errors):,} of {len(self.checked):,} images cannot be read (--skip-unreadable leaves them out): "
            f"{few(errors, N_NAMED, '; ')}"
        )
