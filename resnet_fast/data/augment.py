"""Augmentation settings, and the plan of an epoch: the order of its images and the random numbers for each.

    plan = epoch_plan(len(dataset.train), dataset.train.size, augmentation, seed=0, epoch=1)    # int32 [N, 6 or 17]

Each row is an image. The numbers are drawn on the CPU from (seed, epoch) alone, so a plan depends neither on the device
nor on the number of processes. `Batch.augmented` (dataset.py) applies it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from resnet_fast.common.checks import check_choice, check_integer, check_type, is_number, shown
from resnet_fast.data.draws import further_draws
from resnet_fast.data.options import FLIPS, PADDINGS, is_alpha, is_probability
from resnet_fast.ops.augment import per_channel


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented.

    Args:
        mean, std: one value per channel, for images scaled to [0, 1].
        crop: pixels by which a random crop may extend beyond each edge; 0 for no crop.
        padding: how these pixels are filled: "zero" (black) or "reflect".
        flip: "none", "random" (each image with probability 1/2, drawn again in each epoch) or "alternating" (half of
            the images in one epoch, the other half in the next, so that two epochs show each image both ways; Jordan
            2024, arXiv:2404.00498, section 3.6).
        cutout: side of the square that is set to the mean color, in pixels; 0 for none.
        trivial_augment: whether to apply one random operation of TrivialAugment to each image, with random strength.
        random_erasing: probability in [0, 1] that a random rectangle is set to the mean color.
        mixup, cutmix: alpha of Beta(alpha, alpha), from which the mixing weight of a batch is drawn; 0 for none. If
            both are set, each batch uses one of the two, chosen at random.

    Raises:
        ValueError: flip or padding is unknown, a size is negative, mean or std is not three values, a std is not
            positive, trivial_augment is not a bool, random_erasing is outside [0, 1], or mixup or cutmix is neither 0
            nor in [0.01, 100].

    Cutout: arXiv:1708.04552. TrivialAugment: arXiv:2103.10158. Random erasing: arXiv:1708.04896. mixup:
    arXiv:1710.09412. CutMix: arXiv:1905.04899.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: int = 0
    padding: str = "zero"
    flip: str = "none"
    cutout: int = 0
    trivial_augment: bool = False
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("flip", FLIPS), ("padding", PADDINGS)):
            check_choice(name, getattr(self, name), allowed)
        for name in ("crop", "cutout"):
            check_integer(name, getattr(self, name), 0)
        if not isinstance(self.trivial_augment, bool):
            raise ValueError(f"trivial_augment must be True or False, got {shown(self.trivial_augment)}")
        if not is_probability(self.random_erasing):
            raise ValueError(f"random_erasing must be in [0, 1], got {shown(self.random_erasing)}")
        for name in ("mixup", "cutmix"):
            if not is_alpha(getattr(self, name)):
                raise ValueError(f"{name} must be 0 or in [0.01, 100], got {shown(getattr(self, name))}")
        _check_channels(self.mean, self.std)

    @property
    def changes_nothing(self) -> bool:
        """Whether training images are only normalized, as test images are."""
        return self.crop == 0 and self.flip == "none" and self.cutout == 0 and not self.draws_more

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others, which gives them two labels."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def draws_more(self) -> bool:
        """Whether a plan has the additional columns of draws.py."""
        return self.trivial_augment or self.random_erasing > 0 or self.mixes


def _check_channels(mean: object, std: object) -> None:
    for values in (mean, std):
        if not (isinstance(values, Sequence) and len(values) == 3 and all(map(is_number, values))):
            raise ValueError(f"mean and std must be three values each, got {shown(mean)} and {shown(std)}")
    if min(std) <= 0:  # type: ignore[call-overload]
        raise ValueError(f"std must be three values above 0, got {shown(std)}")


def seeded(*numbers: int) -> torch.Generator:
    """Return a generator seeded with all `numbers`; torch's CPU generator uses only 32 bits of a seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def epoch_plan(n_images: int, size: tuple[int, int], augmentation: Augmentation, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch's images and the random numbers for each.

    Numbers are drawn even if `augmentation` does not use them, so that changing one setting leaves the others' numbers
    unchanged.

    Args:
        n_images: number of images in the split.
        size: height and width of the images, in pixels.
        augmentation: settings of the augmentation.
        seed, epoch: seed of the random numbers; epochs count from 1.

    Returns:
        [n_images, 6], int32: index, shift_y, shift_x in 0 … 2·crop, mirror, cut_y, cut_x. If the augmentation
        `draws_more`: [n_images, 17], with the columns of draws.py.

    Raises:
        TypeError: augmentation or size has another type.
        ValueError: size is not two numbers, or a number is not a non-negative integer.
    """
    check_type("augmentation", augmentation, Augmentation)
    check_type("size", size, tuple, list)
    if len(size) != 2:
        raise ValueError(f"size must be height and width, got {shown(size)}")
    numbers = {"n_images": n_images, "height": size[0], "width": size[1], "seed": seed, "epoch": epoch}
    for name, number in numbers.items():
        check_integer(name, number, 0, 2**100 if name in ("seed", "epoch") else 2**31)
    generator = seeded(seed, epoch)
    order = torch.randperm(n_images, generator=generator)
    shifts = torch.randint(2 * augmentation.crop + 1, (n_images, 2), generator=generator)
    mirror = torch.randint(2, (n_images, 1), generator=generator)
    corners = [
        torch.randint(max(side - augmentation.cutout, 0) + 1, (n_images, 1), generator=generator) for side in size
    ]
    if augmentation.flip == "none":
        mirror.zero_()
    if augmentation.flip == "alternating":
        first = torch.randint(2, (n_images,), generator=seeded(seed))  # per image, in the data set's order
        mirror = ((first[order] + epoch) % 2)[:, None]
    plan = torch.cat([order[:, None], shifts, mirror, *corners], 1).int()
    if not augmentation.draws_more:
        return plan
    more = further_draws(
        n_images,
        size,
        seed,
        epoch,
        trivial_augment=augmentation.trivial_augment,
        random_erasing=augmentation.random_erasing,
        mixup=augmentation.mixup,
        cutmix=augmentation.cutmix,
    )
    return torch.cat([plan, torch.from_numpy(more)], 1)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Scale bytes to [0, 1], subtract the mean and divide by the standard deviation of each channel.

    Args:
        images: [N, 3, H, W], values 0 … 255 in uint8 or a floating-point type.
        mean, std: one value per channel, for images scaled to [0, 1].

    Returns:
        [N, 3, H, W], fp32, channels_last; bit-identical to `ops.augment` without crop, flip and cutout.

    Raises:
        TypeError: images is not a tensor.
        ValueError: images does not have 4 dimensions, mean or std is not three values, or a std is not positive.
    """
    check_type("images", images, Tensor)
    if images.ndim != 4:
        raise ValueError(f"images must be [N, 3, H, W], got {list(images.shape)}")
    _check_channels(mean, std)
    shift = per_channel(tuple(255 * value for value in mean), images.device)
    scale = per_channel(tuple(1 / (255 * value) for value in std), images.device)
    images = images.to(dtype=torch.float32, memory_format=torch.channels_last)
    return (images - shift[:, None, None]) * scale[:, None, None]
