"""CIFAR-10: 50,000 training and 10,000 test images, 3x32x32, ten classes (Krizhevsky 2009).

Torchvision downloads and unpacks it and verifies the md5 of every file. Both happen in a hidden temporary folder beside
the final place, and the finished folder is renamed into it: what lies under `cifar-10-batches-py` is whole.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from resnet_fast.common.checks import check_path
from resnet_fast.data.dataset import DataError, ImageDataset, TensorSplit, check_no_file

# Of the training images. Another std, 0.2023 …, is common on the web: it is the mean of each image's own std.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
# Of the commands that have --dataset; another puts its own in its place.
WITHOUT_NETWORK = "--dataset digits needs no network."


def load_cifar10(data_dir: Path | str) -> ImageDataset:
    """Return CIFAR-10, downloaded to `data_dir` where it is not there yet.

    Args:
        data_dir: holds the folder cifar-10-batches-py or its archive, or is that folder.

    Raises:
        DataError: it is neither there nor to be downloaded, or what is there is damaged.
    """
    data_dir = check_path("data_dir", data_dir)
    check_no_file(data_dir)
    folder = unpacked_folder(data_dir)
    if not folder.exists():
        _fetch(folder.parent)
    try:
        train, test = (_Unpacked(str(folder), train=train) for train in (True, False))
    except (OSError, RuntimeError) as error:
        # torchvision's own reason, a RuntimeError, advises an argument of its own.
        reason = error if isinstance(error, OSError) else "a file is missing, or its MD5 is another"
        raise DataError(f"{folder} is not a whole CIFAR-10 ({reason}); remove that folder and start again") from error
    return ImageDataset(
        name="cifar10",
        classes=tuple(train.classes),
        train=_split(train),
        test=_split(test),
        mean=MEAN,
        std=STD,
        crop_padding=4,
        flip=True,
    )


def unpacked_folder(data_dir: Path) -> Path:
    """Return the folder of the batches: one in `data_dir`, which need not exist yet, or `data_dir` itself."""
    inside = data_dir / CIFAR10.base_folder
    is_itself = data_dir.name == CIFAR10.base_folder or (data_dir / CIFAR10.meta["filename"]).exists()
    return data_dir if is_itself and not inside.exists() else inside


class _Unpacked(CIFAR10):
    """CIFAR-10 whose root is the folder of the batches itself."""

    base_folder = ""


def _split(dataset: CIFAR10) -> TensorSplit:
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)  # NHWC in memory, and left so
    return TensorSplit(images, torch.tensor(dataset.targets, dtype=torch.int64))


def _fetch(data_dir: Path) -> None:
    """Unpack the archive if it lies in `data_dir`, download it otherwise; leave the whole folder or nothing."""
    archive = data_dir / CIFAR10.filename
    if archive.exists() and not check_integrity(str(archive), CIFAR10.tgz_md5):
        raise DataError(
            f"{archive} is damaged or only partly downloaded (its md5 is not {CIFAR10.tgz_md5}); "
            "remove it and start again, or put a whole copy in its place"
        )
    missing = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=".cifar10-unfinished-", dir=data_dir))
        try:
            if archive.exists():
                extract_archive(str(archive), str(workplace))
            else:
                CIFAR10(str(workplace), download=True)
            finished = data_dir / CIFAR10.base_folder
            if not finished.exists():  # another process may have been faster
                os.rename(workplace / CIFAR10.base_folder, finished)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
    # URLError is an OSError; torchvision says RuntimeError for a wrong md5; a cut connection is an HTTPException,
    # a cut archive an EOFError or a zlib/tarfile error. All of them mean the same to the user.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        what = "could not be unpacked" if archive.exists() else f"is not in {data_dir} and could not be downloaded"
        raise DataError(
            f"CIFAR-10 {what} ({reason}). Put {CIFAR10.filename} ({CIFAR10.url}) into {data_dir}, "
            f"or name the folder that holds it with --data-dir. {WITHOUT_NETWORK}"
        ) from error
    finally:
        for folder in missing:  # created above: those that stayed empty go again
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
