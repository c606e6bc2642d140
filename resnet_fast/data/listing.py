"""List the images of a folder and their classes: <folder>/<part>/<class>/…/<image>.

Classes and images are sorted by name, as in torchvision's ImageFolder. Hidden files and folders are ignored. Other
files that are not images of a class are listed, so that the user can be told.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from resnet_fast.common.checks import few, is_text
from resnet_fast.data.dataset import DataError, check_no_file

PARTS = ("train", "test")
OTHER_NAMES = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation", "eval")}
HIDDEN = ("thumbs.db", "desktop.ini", "__macosx")  # and names that begin with a dot
N_NAMED = 20  # files or classes that a message names


class Listing(NamedTuple):
    """The files of train/ or test/.

    Args:
        classes: names of the class folders, sorted.
        samples: path and label of each image, class by class.
        other_endings: paths of files in class folders without an image's extension.
        without_class: paths of files next to the class folders.
    """

    classes: tuple[str, ...]
    samples: list[tuple[str, int]]
    other_endings: list[str]
    without_class: list[str]


def list_images(folder: Path, part: str) -> Listing:
    """Return the files of `part`, "train" or "test". Links are followed; each folder is visited once per class.

    Raises:
        DataError: there is no class folder, a class has no image, or its name is not UTF-8.
        OSError: a folder cannot be listed.
    """
    folders, files = _entries(str(folder / part))
    for name in folders:
        if not is_text(name):
            readable = os.fsencode(name).decode("utf-8", "backslashreplace")
            raise DataError(f"the name of the class folder {folder / part}/{readable} is not UTF-8; rename it")
    listing = Listing(tuple(folders), [], [], [os.path.join(folder, part, name) for name in files])
    without_images = []
    for label, name in enumerate(folders):
        paths = [path for _, paths in sorted(_walk(os.path.join(folder, part, name))) for path in paths]
        images = [path for path in paths if _is_image(path)]
        others = [path for path in paths if not _is_image(path)]
        listing.samples.extend((path, label) for path in images)
        listing.other_endings.extend(others)
        if not images:
            reason = f"{len(others)} files, none with an image's extension" if others else "no visible files"
            without_images.append(f"{name}/ ({reason})")
    if not folders:
        raise _no_images(folder, part, ["no class folder"])
    if without_images:
        raise _no_images(folder, part, without_images)
    return listing


def check_layout(folder: Path) -> None:
    """Raise DataError unless `folder` has train/ and test/; the message says what is there instead."""
    check_no_file(folder)
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist; {_expected(folder)}")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if not missing:
        return
    for part in missing:
        check_no_file(folder / part)
    folders = _entries(str(folder))[0]
    reason = f"the data folder {folder} has no {'/ and no '.join(missing)}/"
    above = Path(os.path.abspath(folder)).parent
    renamed = [(name, part) for part in missing for name in folders if name.lower() in OTHER_NAMES[part]]
    if renamed:
        reason += "".join(f"; rename {name}/ to {part}/" for name, part in renamed)
    elif (above / "train").is_dir():
        reason += f"; the folder above has it: use --data-dir {above}"
    elif folders:
        reason += f", only {few([f'{name}/' for name in folders], N_NAMED)}"
    raise DataError(f"{reason}; {_expected(folder)}")


def _no_images(folder: Path, part: str, reasons: Sequence[str]) -> DataError:
    """Return the error for a part without classes, or with a class without images."""
    return DataError(f"no images to use in {folder / part}: {few(reasons, N_NAMED)}; {_expected(folder)}")


@cache
def image_endings() -> frozenset[str]:
    """Return the extensions of all formats that Pillow opens, in lower case, with the dot."""
    Image.preinit()  # first the common formats, which Pillow then tries first
    endings = Image.registered_extensions()  # loads all formats
    opened = {*Image.OPEN, "MPO"}  # JPEG's opener opens a JPEG of several frames, too
    return frozenset(ending for ending, kind in endings.items() if kind in opened)


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in image_endings()


def _expected(folder: Path) -> str:
    return f"expected {folder}/train/<class>/<image> and {folder}/test/<class>/<image>"


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield `folder` and each folder below it, with its files' paths. Each is visited once, so loops of links end."""
    seen, pending = set(), [folder]
    while pending:
        current = pending.pop()
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files = _entries(current)
        pending += [os.path.join(current, name) for name in reversed(folders)]
        yield current, [os.path.join(current, name) for name in files]


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the files that are not hidden, sorted."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not (entry.name.startswith(".") or entry.name.lower() in HIDDEN):
                (folders if _is_folder(entry) else files).append(entry.name)
    return sorted(folders), sorted(files)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
