"""What may be asked of the data."""

DOWNLOADED = ("cifar10", "cifar100", "svhn")
DATASETS = (*DOWNLOADED, "digits", "folder")
NOT_MIRRORED = ("svhn", "digits")  # a mirrored 2 is no 2
FLIPS = ("none", "random", "alternating")
PADDINGS = ("zero", "reflect")
MAX_IMAGE_SIZE = 1024  # pixels, in height and width
