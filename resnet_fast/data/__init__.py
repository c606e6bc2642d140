"""The data sets that `resnet-fast train` knows: cifar10, cifar100, svhn, digits and a folder of images."""

from typing import TYPE_CHECKING

from resnet_fast.common.lazy import lazy_imports

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
    "load_cifar100",
    "load_dataset",
    "load_digits",
    "load_folder",
    "load_svhn",
    "normalize",
    "read_image",
]

if TYPE_CHECKING:
    from resnet_fast.data.augment import Augmentation, epoch_plan, normalize
    from resnet_fast.data.dataset import Batch, DataError, ImageDataset, Split, TensorSplit
    from resnet_fast.data.digits import load_digits
    from resnet_fast.data.folder import load_folder
    from resnet_fast.data.images import ImageError, read_image
    from resnet_fast.data.load import load_dataset
    from resnet_fast.data.loader import Loader
    from resnet_fast.data.options import DATASETS
    from resnet_fast.data.torchvision_sets import load_cifar10, load_cifar100, load_svhn
else:
    lazy_imports(__name__, __all__)
