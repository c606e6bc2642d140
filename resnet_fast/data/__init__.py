"""The data sets that `resnet-fast train` knows: cifar10, digits and a folder of images."""

from typing import TYPE_CHECKING

from resnet_fast._lazy import lazy_imports

__all__ = [
    "DATASETS",
    "Augmentation",
    "Batch",
    "DataError",
    "ImageDataset",
    "ImageError",
    "Loader",
    "Split",
    "TensorSplit",
    "epoch_plan",
    "load_cifar10",
    "load_dataset",
    "load_digits",
    "load_folder",
    "normalize",
    "read_image",
]

<<<<<<< HEAD
if TYPE_CHECKING:
    from resnet_fast.data.augment import Augmentation, epoch_plan, normalize
    from resnet_fast.data.cifar10 import load_cifar10
    from resnet_fast.data.dataset import Batch, DataError, ImageDataset, Split, TensorSplit
    from resnet_fast.data.digits import load_digits
    from resnet_fast.data.folder import load_folder
    from resnet_fast.data.images import ImageError, read_image
    from resnet_fast.data.load import load_dataset
    from resnet_fast.data.loader import Loader
    from resnet_fast.data.options import DATASETS
else:
    lazy_imports(__name__, __all__)
=======

def load_dataset(
    name: str,
    data_dir: Path | str = "data",
    *,
    image_size: int = 32,
    workers: int = 0,
    skip_unreadable: bool = False,
) -> ImageDataset:
    """Return the data set called `name`.

    Args:
        name: "cifar10", "digits" or "folder".
        data_dir: where CIFAR-10 lies or is downloaded to, or the folder with train/ and test/; digits needs none.
        image_size: height and width of "digits" and "folder"; CIFAR-10 is 32x32.
        workers: processes that read the images of "folder".
        skip_unreadable: leave out the images of "folder" that cannot be read (`load_folder`).

    Raises:
        TypeError, ValueError: there is no such data set, or another argument breaks its rule.
        DataError: it is not available, or damaged.
    """
    check_choice("dataset", name, DATASETS)
    data_dir = check_path("data_dir", data_dir)
    check_integer("image_size", image_size, 1, MAX_IMAGE_SIZE + 1)
    check_integer("workers", workers, 0)
    check_type("skip_unreadable", skip_unreadable, bool)
    if name == "cifar10":
        return load_cifar10(data_dir)
    return load_digits(image_size) if name == "digits" else load_folder(data_dir, image_size, workers, skip_unreadable)
>>>>>>> b60ca5e (The digits come with the package, in any image size)
