"""The UCI handwritten digits: 1,797 real scans of 8x8 pixels, in the package.

digits.npz holds `images`, uint8 [1797, 8, 8] with values 0 … 16, and `labels`, uint8 [1797]: the test set of "Optical
Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak 1998, UCI Machine Learning Repository,
doi.org/10.24432/C50P49, CC BY 4.0), in scikit-learn's order.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from resnet_fast.common.checks import check_integer
from resnet_fast.data.dataset import ImageDataset, TensorSplit, channel_statistics
from resnet_fast.data.options import MAX_IMAGE_SIZE, NOT_MIRRORED

FILE = Path(__file__).with_name("digits.npz")
SCAN_SIZE = 8
TEST_PER_CLASS = 36  # a fifth: 360 test images, 1,437 training images
SPLIT_SEED = 0  # --seed must not change which images are tested on


def load_digits(image_size: int = 32) -> ImageDataset:
    """Return the digits, always split in the same way.

    Augmentation: random crops shifted by up to half a scan pixel, rounded (0 at 8x8, 1 at 12x12, 2 at 32x32). The usual
    4 pixels at 32x32 would cut off strokes at the border. No horizontal flip, because a mirrored 2 is not a 2.

    Args:
        image_size: height and width to which the scans are enlarged, 8 … 1024.

    Raises:
        ValueError: image_size is not an integer in that range.
    """
    image_size = check_integer("image_size", image_size, SCAN_SIZE, MAX_IMAGE_SIZE + 1)
    with np.load(FILE) as file:
        scans, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).to(torch.int64)
    images = _enlarge(scans, image_size)
    is_test = _test_mask(labels.numpy())
    mean, std = channel_statistics(images[~is_test])
    return ImageDataset(
        name="digits",
        classes=tuple("0123456789"),
        train=TensorSplit(images[~is_test], labels[~is_test]),
        test=TensorSplit(images[is_test], labels[is_test]),
        mean=mean,
        std=std,
        crop_padding=round(image_size / (2 * SCAN_SIZE)),
        flip="digits" not in NOT_MIRRORED,
    )


def _enlarge(scans: torch.Tensor, image_size: int) -> torch.Tensor:
    """Turn [N, 8, 8] with values 0 … 16 into [N, 3, image_size, image_size], uint8."""
    size = (image_size, image_size)
    images = F.interpolate(scans[:, None].double(), size=size, mode="bicubic", align_corners=False)
    images = (images * (255 / 16)).round().clamp(0, 255)  # bicubic overshoots at edges
    return images.to(torch.uint8).repeat(1, 3, 1, 1)


def _test_mask(labels: np.ndarray) -> torch.Tensor:
    """Mark the test images: the same number of each digit."""
    random = np.random.RandomState(SPLIT_SEED)  # numpy promises that this stream never changes
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_test[random.permutation(np.flatnonzero(labels == digit))[:TEST_PER_CLASS]] = True
    return is_test
