"""The choices and limits of the data settings."""

from resnet_fast.common.checks import is_number

DOWNLOADED = ("cifar10", "cifar100", "svhn")
DATASETS = (*DOWNLOADED, "digits", "folder")
NOT_MIRRORED = ("svhn", "digits")  # a mirrored 2 is not a 2
FLIPS = ("none", "random", "alternating")
PADDINGS = ("zero", "reflect")
MAX_IMAGE_SIZE = 1024  # pixels, in height and width


def is_probability(value: object) -> bool:
    return is_number(value) and 0 <= value <= 1  # type: ignore[operator]


def is_alpha(value: object) -> bool:
    """Return whether `value` is 0 (off), or Beta(value, value) can be sampled without overflow."""
    return is_number(value) and (value == 0 or 0.01 <= value <= 100)  # type: ignore[operator]
