"""Random numbers for erasing, TrivialAugment and mixing: columns 6 to 16 of a plan, 0 where nothing is done.

     6 …  9   top, left, height, width of the rectangle that is erased
    10, 11    TrivialAugment's operation, 0 … 13, and its strength, -30 … 30
    12 … 16   weight (the bits of an fp32), top, left, height, width of the region in which two images are mixed

The distributions are those of torchvision's v2 transforms RandomErasing, TrivialAugmentWide, MixUp and CutMix with
default settings. Each part has its own generator, so that switching one on or off leaves the others unchanged. numpy's
RandomState gives the same numbers in every version.
"""

import math

import numpy as np

from resnet_fast.ops.trivial_augment import N_OPERATIONS, N_STRENGTHS

ERASED, TRIVIAL, MIXED = slice(6, 10), slice(10, 12), slice(12, 17)
N_COLUMNS = 17
_ERASING, _TRIVIAL, _MIXING = 1, 2, 3  # seeds of the generators

# Erased share of the image's area, and height / width; Zhong et al. 2017, arXiv:1708.04896.
ERASED_SHARE, ERASED_RATIO, N_TRIES = (0.02, 0.33), (0.3, 3.3), 10


def further_draws(
    n_images: int,
    size: tuple[int, int],
    seed: int,
    epoch: int,
    *,
    trivial_augment: bool,
    random_erasing: float,
    mixup: float,
    cutmix: float,
) -> np.ndarray:
    """Return columns 6 to 16 of a plan, [n_images, 11], int32.

    Mixing is drawn for each row. The loader copies the first row's to the whole batch.

    Args:
        n_images: number of images in the split.
        size: height and width of the images, in pixels.
        seed, epoch: seed of the random numbers.
        trivial_augment, random_erasing, mixup, cutmix: as in `Augmentation`.
    """
    draws = np.zeros((n_images, N_COLUMNS), np.int32)
    if random_erasing:
        draws[:, ERASED] = _erased(_generator(seed, epoch, _ERASING), n_images, size, random_erasing)
    if trivial_augment:
        random = _generator(seed, epoch, _TRIVIAL)
        sign = 1 - 2 * random.randint(2, size=n_images)
        draws[:, TRIVIAL.start] = random.randint(N_OPERATIONS, size=n_images)
        draws[:, TRIVIAL.start + 1] = sign * random.randint(N_STRENGTHS, size=n_images)
    if mixup or cutmix:
        draws[:, MIXED] = _mixed(_generator(seed, epoch, _MIXING), n_images, size, mixup, cutmix)
    return draws[:, ERASED.start :]


def _generator(*numbers: int) -> np.random.RandomState:
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(numbers)))


def _erased(random: np.random.RandomState, n_images: int, size: tuple[int, int], probability: float) -> np.ndarray:
    """Return the rectangles, [n_images, 4]: the first of ten tries that fits in the image, or zeros."""
    height, width = size
    is_erased = random.random_sample(n_images) < probability
    area = height * width * random.uniform(*ERASED_SHARE, size=(n_images, N_TRIES))
    flat, steep = map(math.log, ERASED_RATIO)
    ratio = np.exp(random.uniform(flat, steep, size=(n_images, N_TRIES)))
    tall, wide = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (tall < height) & (wide < width)
    first = np.arange(n_images), fits.argmax(1)
    tall, wide = tall[first], wide[first]
    top = np.floor(random.random_sample(n_images) * (height - tall + 1))
    left = np.floor(random.random_sample(n_images) * (width - wide + 1))
    return np.where((is_erased & fits.any(1))[:, None], np.stack([top, left, tall, wide], 1), 0)


def _mixed(
    random: np.random.RandomState, n_images: int, size: tuple[int, int], mixup: float, cutmix: float
) -> np.ndarray:
    """Return weights and regions, [n_images, 5]: mixup covers the whole image, CutMix has weight 0 in a part of it."""
    height, width = size
    is_cut = random.random_sample(n_images) < (0.5 if mixup and cutmix else bool(cutmix))
    weight = random.beta(mixup, mixup, n_images) if mixup else np.zeros(n_images)
    whole = np.tile([0, 0, height, width], (n_images, 1))
    center = random.randint(np.maximum(size, 1), size=(n_images, 2))
    radius = 0.5 * np.sqrt(1 - random.beta(cutmix, cutmix, n_images)) if cutmix else np.zeros(n_images)
    half = (radius[:, None] * size).astype(np.int64)
    first, last = np.maximum(center - half, 0), np.minimum(center + half, size)
    region = np.where(is_cut[:, None], np.concatenate([first, last - first], 1), whole)
    bits = np.where(is_cut, 0, weight).astype(np.float32).view(np.int32)
    return np.concatenate([bits[:, None], region], 1)
