"""One epoch of the input path: shuffled batches of 32x32 images, cropped, flipped, normalized, on the device."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.correctness import Tolerance
from benchmarks.harness import Level, Problem, Provider, Run, Setting
from benchmarks.replay import CLOCK
from benchmarks.work import Work
from resnet_fast.data import Augmentation, Batch, Loader, TensorSplit, epoch_plan

# isort: split
from torchvision import transforms

N_IMAGES = {"cpu": 2048, "cuda": 16384}
BATCH_SIZES = {"cpu": 128, "cuda": 512}
N_CHECKED = 16
SIZE, PADDING = 32, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's
UNMOVED = PADDING * (2 * PADDING + 1) + PADDING  # index of the unshifted crop among the 81 crops of an image
N_WORKERS = min(8, os.cpu_count() or 1)


class Data(NamedTuple):
    """Images, uint8 [N, 3, 32, 32], and labels, [N], on the CPU; and the device of the batches."""

    images: Tensor
    labels: Tensor
    device: torch.device


Epoch = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def on_device(data: Data, batch_size: int, shuffle: bool) -> Epoch:
    """Make resnet_fast's loader: the data set is on the device, and a whole batch is augmented at once."""
    split = TensorSplit(data.images, data.labels).to(data.device)
    augmentation = Augmentation(MEAN, STD, crop=PADDING, flip="random")
    loader = Loader(split, augmentation, batch_size)
    epochs = itertools.count(1)

    def batches() -> Iterable[Batch]:
        if shuffle:
            return loader.epoch(next(epochs))
        plan = epoch_plan(len(split), split.size, augmentation, seed=0, epoch=next(epochs))
        plan[:, 0] = torch.arange(len(split))
        return split.planned(plan, [len(rows) for rows in plan.split(batch_size)])

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches():
            yield batch.augmented(augmentation)

    return epoch


class PILImages(Dataset):
    """Samples like those of torchvision's CIFAR10: a transformed PIL image and its label."""

    def __init__(self, data: Data, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = data.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels, self.transform = data.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def torchvision_loader(data: Data, batch_size: int, shuffle: bool) -> Epoch:
    """Make torchvision's loader as tutorials write it: transforms of single images in a DataLoader's workers."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(SIZE, padding=PADDING),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    n_workers = N_WORKERS if shuffle else 0
    loader = DataLoader(
        PILImages(data, transform),
        batch_size,
        shuffle=shuffle,
        num_workers=n_workers,
        persistent_workers=n_workers > 0,
        pin_memory=data.device.type == "cuda",
    )

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in loader:
            yield images.to(data.device, non_blocking=True), labels.to(data.device, non_blocking=True)

    return epoch


class LoaderRun(Run):
    """An epoch over all images."""

    def __init__(self, make: Callable[[Data, int, bool], Epoch], setting: Setting, data: Data) -> None:
        self.make, self.data = make, data
        self.epoch = make(data, setting.batch_size, True)

    def __call__(self) -> int:
        return sum(len(labels) for _, labels in self.epoch())

    def observe(self) -> dict[str, Tensor]:
        """Return the first images' labels, their distances to the nearest crop, and whether any crop was shifted."""
        few = Data(self.data.images[:N_CHECKED], self.data.labels[:N_CHECKED], self.data.device)
        ((images, labels),) = self.make(few, N_CHECKED, False)()
        distance, crop = nearest(images.cpu(), few.images)
        # 1 + distance: a distance of 0 would leave no room for a rounding.
        return {"labels": labels.cpu(), "1 + distance": 1 + distance, "moved": (crop != UNMOVED).any()}

    def finish(self) -> None:
        labels = torch.cat([labels.cpu() for _, labels in self.epoch()])
        if not torch.equal(labels.sort().values, self.data.labels.sort().values) or torch.equal(
            labels, self.data.labels
        ):
            raise RuntimeError(f"an epoch must be a shuffle of the {len(self.data.labels)} images, but is not")


def nearest(augmented: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image's largest difference from the nearest of its 162 normalized crops, and that crop's index.

    The second 81 crops are flipped.

    Args:
        augmented: [N, 3, 32, 32], augmented and normalized.
        images: [N, 3, 32, 32], uint8.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    padded = torch.nn.functional.pad(images.double() / 255, (PADDING,) * 4)
    crops = padded.unfold(2, SIZE, 1).unfold(3, SIZE, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # [N, 81, 3, 32, 32]
    crops = (torch.cat([crops, crops.flip(-1)], 1) - mean) / std
    distances = (crops - augmented.double()[:, None]).abs().flatten(2).amax(2)
    least = distances.min(1)
    return least.values, least.indices


class LoaderLevel(Level):
    name = "loader"
    hide_launches = False
    rounds = {"cpu": 10, "cuda": 10}
    quick_rounds = {"cpu": 3, "cuda": 3}
    warm_up = {"cpu": 1, "cuda": 1}  # the workers start
    providers = {
        "torchvision": Provider(partial(LoaderRun, torchvision_loader)),
        "on device": Provider(partial(LoaderRun, on_device)),
    }

    def settings(self, device: torch.device, quick: bool) -> Iterator[Setting]:
        case = f"{N_IMAGES[device.type]} images 3x32x32"
        yield Setting(case, "epoch", "fp32", "channels_last", BATCH_SIZES[device.type])

    def problem(self, setting: Setting, device: torch.device) -> Problem:
        generator = torch.Generator().manual_seed(torch.seed())  # fresh data in every run
        n_images = N_IMAGES[device.type]
        images = torch.randint(256, (n_images, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        data = Data(images, torch.randint(10, (n_images,), generator=generator), device)
        exact = {"labels": data.labels[:N_CHECKED], "1 + distance": torch.ones(N_CHECKED), "moved": torch.tensor(True)}
        return Problem(data, exact, Tolerance(2.0**-24, n_roundings=16, n_rows=0))

    def work(self, setting: Setting) -> Work:
        return Work(0)  # an input path has no roof

    def n_images(self, setting: Setting) -> int:
        return int(setting.case.split()[0])


LEVEL = LoaderLevel()


@pytest.mark.benchmark(timer=CLOCK)
def test_loader(timed: Callable[[], None]) -> None:
    timed()
