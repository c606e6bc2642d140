"""What may be asked of the data."""

DATASETS = ("cifar10", "digits", "folder")
FLIPS = ("none", "random", "alternating")
PADDINGS = ("zero", "reflect")
MAX_IMAGE_SIZE = 1024  # pixels, in height and width
