"""Read an image file, in one way for training, `eval` and `predict`.

    pixels = read_image("photo.jpg", 32)    # uint8 [3, 32, 32]

Pillow decodes the file. Integers of 16 bits and floating-point numbers are scaled to 8 bits, the orientation that a
camera noted (EXIF) is applied, transparent pixels are composited over black (the padding of a crop is black, too), and
the result is resized by Pillow's bilinear filter, which averages over all pixels when it shrinks. The aspect ratio is
not kept. Of several frames the first is read. docs/images.md lists formats and modes.
"""

import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from resnet_fast.common.checks import check_integer, check_type
from resnet_fast.data.options import MAX_IMAGE_SIZE

DEEP = ("I", "F")  # modes of more than 8 bits; so are I;16 in any byte order
# PNG gives its transparent color in the file's bit depth, Pillow gives pixels in 8 bits. (Of 16 bits Pillow keeps the
# upper 8, so a color that differs only in the lower 8 becomes transparent, too.)
TRANSPARENT_COLOR = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}

# Without any handler Python would print Pillow's records to the terminal.
logging.getLogger("PIL").addHandler(logging.NullHandler())
_stderr_lock = threading.Lock()


class ImageError(RuntimeError):
    """A file cannot be read as an image; the message names the file and the reason, in one line."""


def read_image(path: Path | str, image_size: int) -> Tensor:
    """Return the first image of a file of any size and in any format that Pillow reads.

    Args:
        path: a regular file, or a link to one.
        image_size: height and width of the result, in pixels.

    Returns:
        [3, image_size, image_size], uint8.

    Raises:
        TypeError: path is no path.
        ValueError: image_size is not an integer in 1 … 1024.
        ImageError: there is no such file, it cannot be read, or its white is unknown: integers outside 0 … 65535,
            floating-point numbers outside [0, 1].
    """
    check_type("path", path, str, os.PathLike)
    check_integer("image_size", image_size, 1, MAX_IMAGE_SIZE + 1)
    with without_warnings():
        return torch.from_numpy(read_pixels(path, image_size)).permute(2, 0, 1)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings of large images and odd metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_pixels(path: Path | str, image_size: int) -> np.ndarray:
    """Return the image as `read_image` does, [image_size, image_size, 3]; for use inside `without_warnings`."""
    try:
        _check_is_file(path)
        with Image.open(path) as image:
            _load(image)
            image = _over_black(image)
            return np.array(image.resize((image_size, image_size), Image.Resampling.BILINEAR))[..., :3]
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error …
        raise ImageError(f"{path}: {_reason(error)}") from error


def _check_is_file(path: Path | str) -> None:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("is a folder; name the images in it, such as FOLDER/*.png")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is no regular file")  # a named pipe would be waited for
    if status.st_size == 0:
        raise ValueError("the file is empty")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image in a format that Pillow reads"
    if isinstance(error, FileNotFoundError):
        return "a link to a file that is not there" if os.path.islink(error.filename) else "no such file"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _load(image: Image.Image) -> None:
    """Decode the image, turn it as its camera was held, and mend the transparent color of PNG."""
    if image.format == "JPEG" and image.info.keys().isdisjoint(("exif", "xmp")):
        image.load()  # the quick way for most
        return
    codec, *_, mode = (getattr(image, "tile", None) or [("", "")])[0]
    with _libtiff_is_quiet() if codec == "libtiff" else nullcontext():
        image.load()
    with suppress(Exception):  # the pixels count, even if the note of the orientation is damaged
        ImageOps.exif_transpose(image, in_place=True)
    scale, color = TRANSPARENT_COLOR.get(mode) if image.format == "PNG" else None, image.info.get("transparency")
    if scale and color is not None:
        image.info["transparency"] = tuple(int(c * scale) for c in color) if mode == "RGB;16B" else color * scale


@contextmanager
def _libtiff_is_quiet() -> Iterator[None]:
    """Keep libtiff's own messages from the terminal; Pillow raises an error for each."""
    with _stderr_lock:  # else a second thread would save the first one's /dev/null as the terminal
        try:
            terminal = os.dup(2)
        except OSError:  # closed
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _over_black(image: Image.Image) -> Image.Image:
    """Return the image in mode RGB, or RGBa (colors multiplied by alpha), which over black is the same."""
    if image.mode in DEEP or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    if image.mode in ("RGB", "RGBa") and "transparency" not in image.info:
        return image
    if image.mode == "La":
        return image.getchannel("L").convert("RGB")
    if image.has_transparency_data:
        return image.convert("RGBA").convert("RGBa")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return an image of integers or floating-point numbers in mode L: 0 … 65535 or, of TIFF, 0 … 2^bits - 1; 0 … 1."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits = min(tags.get(ExifTags.Base.BitsPerSample, (16,))[0], 16)
    white = 1 if image.mode == "F" else 2**bits - 1
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # so that NaN is refused
        kind = "floating-point numbers" if image.mode == "F" else "integers"
        raise ValueError(f"its pixels are {kind}, not all of them in 0 … {white}: nothing says which is white")
    gray = np.rint(values * (255 / white)).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # 0 is white; Pillow inverts this only for 8 bits
        gray = 255 - gray
    color = image.info.get("transparency")
    if color is not None:
        gray[values == color] = 0
    return Image.fromarray(gray)
