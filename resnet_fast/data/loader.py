"""Shuffled training batches, on one process or on several that share each batch.

loader = Loader(dataset.train.to(device), Augmentation(dataset.mean, dataset.std, crop=4), batch_size=512, seed=0)
for epoch in range(1, n_epochs + 1):
    for batch in loader.epoch(epoch):  # Batch, which training.TrainingStep accepts
        images, labels = batch.augmented(loader.augmentation)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from resnet_fast.common.checks import check_integer, check_type
from resnet_fast.data.augment import Augmentation, epoch_plan
from resnet_fast.data.dataset import Batch, Split
from resnet_fast.data.draws import MIXED


class Loader:
    """Shuffled batches of each epoch; the last batch may be smaller.

    A last batch of fewer than 2 images per process is left out, because batch norm cannot compute statistics of a
    single value. Mixing uses the random numbers of a batch's first image for the whole batch, on all processes.

    Args:
        split: training images, on the device that trains.
        augmentation: settings of the augmentation.
        batch_size: images per step, over all processes.
        seed: seed of the order and the augmentation.
        rank, world_size: index of this process, and number of processes. Their shares of a batch differ by at most one
            image.

    Raises:
        TypeError: split or augmentation has another type.
        ValueError: batch_size or the split has fewer than 2 images per process, or a number is not an integer in its
            range.
    """

    def __init__(
        self,
        split: Split,
        augmentation: Augmentation,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_type("split", split, Split)
        check_type("augmentation", augmentation, Augmentation)
        batch_size, seed = check_integer("batch_size", batch_size), check_integer("seed", seed, 0)
        world_size = check_integer("world_size", world_size)
        rank = check_integer("rank", rank, 0, below=world_size)
        least = 2 * world_size
        if batch_size < least:
            raise ValueError(f"batch_size must be at least {least}, 2 for each process, got {batch_size}")
        if len(split) < least:
            raise ValueError(f"training needs at least {least} images, 2 for each process, got {len(split)}")
        self.split, self.augmentation, self.batch_size, self.seed = split, augmentation, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.batch_sizes())

    def batch_sizes(self) -> list[int]:
        """Return the number of images in each batch of an epoch, over all processes."""
        full, rest = divmod(len(self.split), self.batch_size)
        return [self.batch_size] * full + ([rest] if rest >= 2 * self.world_size else [])

    def epoch(self, epoch: int) -> "Epoch":
        """Return this process's share of each batch of an epoch; epochs count from 1."""
        return Epoch(self, epoch)


@dataclass(frozen=True)
class Epoch:
    """The batches of one epoch. Each iteration yields the same batches.

    This is not a generator, because Lightning calls iter() twice and would lose the batches of the first time.
    """

    loader: Loader
    epoch: int

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        loader, sizes = self.loader, self.loader.batch_sizes()
        plan = epoch_plan(len(loader.split), loader.split.size, loader.augmentation, loader.seed, self.epoch)
        if loader.augmentation.mixes:
            for rows in plan[: sum(sizes)].split(sizes):
                rows[:, MIXED] = rows[0, MIXED].clone()
        shares = [rows.tensor_split(loader.world_size)[loader.rank] for rows in plan[: sum(sizes)].split(sizes)]
        yield from loader.split.planned(torch.cat(shares), [len(share) for share in shares])
