"""The UCI handwritten digits that scikit-learn carries: 1,797 real scans of 8x8 pixels, no network needed.

They are enlarged to 3x32x32, so that the networks and recipes for CIFAR-10 run on them unchanged.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from resnet_fast.data.dataset import DataError, ImageDataset, TensorSplit, channel_statistics

TEST_PER_CLASS = 36  # a fifth: 360 test images, 1,437 training images
SPLIT_SEED = 0  # of the split only: --seed must not change what is tested on
IMAGE_SIZE = 32


def load_digits() -> ImageDataset:
    """Return the digits, always split in the same way.

    Augmentation: a crop with a shift of up to 2 pixels (half a pixel of the original scan; the 4 pixels of CIFAR-10
    would cut off strokes at the border), and no horizontal flip, because a mirrored digit is another sign: a mirrored
    2 is no 2, and training on it teaches something that never occurs.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load_scans
    except ModuleNotFoundError as error:
        raise DataError("--dataset digits needs scikit-learn: pip install 'resnet-fast[train]'") from error

    scans: Any = load_scans()  # a Bunch; its stubs say it may be a tuple
    images = _enlarge(torch.from_numpy(scans.images))
    labels = torch.from_numpy(scans.target).to(torch.int64)
    is_test = _test_mask(scans.target)
    mean, std = channel_statistics(images[~is_test])
    return ImageDataset(
        name="digits",
        classes=tuple("0123456789"),
        train=TensorSplit(images[~is_test], labels[~is_test]),
        test=TensorSplit(images[is_test], labels[is_test]),
        mean=mean,
        std=std,
        crop_padding=2,
        flip=False,
    )


def _enlarge(scans: torch.Tensor) -> torch.Tensor:
    """Turn [N, 8, 8] with values 0 … 16 into [N, 3, 32, 32], uint8."""
    images = F.interpolate(scans[:, None], size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    images = (images * (255 / 16)).round().clamp(0, 255)  # bicubic overshoots at edges
    return images.to(torch.uint8).repeat(1, 3, 1, 1)


def _test_mask(labels: np.ndarray) -> torch.Tensor:
    """Mark the test images: the same number of each digit."""
    random = np.random.RandomState(SPLIT_SEED)  # numpy promises that this stream never changes
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_test[random.permutation(np.flatnonzero(labels == digit))[:TEST_PER_CLASS]] = True
    return is_test
