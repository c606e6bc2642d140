"""Load a data set by its name."""

from pathlib import Path

from resnet_fast.common.checks import check_choice, check_integer, check_path, check_type, shown
from resnet_fast.data.dataset import ImageDataset
from resnet_fast.data.digits import load_digits
from resnet_fast.data.folder import load_folder
from resnet_fast.data.options import DATASETS, MAX_IMAGE_SIZE
from resnet_fast.data.torchvision_sets import load_cifar10, load_cifar100, load_svhn

DOWNLOADING = {"cifar10": load_cifar10, "cifar100": load_cifar100, "svhn": load_svhn}


def load_dataset(
    name: str,
    data_dir: Path | str = "data",
    *,
    image_size: int = 32,
    workers: int = 0,
    skip_unreadable: bool = False,
    mirror: str | None = None,
) -> ImageDataset:
    """Return the data set called `name`.

    Args:
        name: "cifar10", "cifar100", "svhn", "digits" or "folder".
        data_dir: folder of the first three, downloaded if missing; for "folder" the folder with train/ and test/.
        image_size: height and width in pixels of "digits" and "folder"; the others are 32x32.
        workers: number of processes that read the images of "folder".
        skip_unreadable: whether to leave out images of "folder" that cannot be read (`load_folder`).
        mirror: URL to download from instead of the known servers (`load_cifar10`).

    Raises:
        TypeError: skip_unreadable is not a bool.
        ValueError: name is unknown, or another argument breaks its rule.
        DataError: the data set is missing and cannot be downloaded, or is damaged.
    """
    check_choice("dataset", name, DATASETS)
    data_dir = check_path("data_dir", data_dir)
    check_integer("image_size", image_size, 1, MAX_IMAGE_SIZE + 1)
    check_integer("workers", workers, 0)
    check_type("skip_unreadable", skip_unreadable, bool)
    if name in DOWNLOADING:
        return DOWNLOADING[name](data_dir, mirror)  # which checks the mirror
    if mirror is not None:
        raise ValueError(f"mirror is for {', '.join(DOWNLOADING)}, got {shown(mirror)} with {name}")
    return load_digits(image_size) if name == "digits" else load_folder(data_dir, image_size, workers, skip_unreadable)
