"""Read an image file, in the same way for training, `eval` and `predict`.

    pixels = read_image("photo.jpg", 32)    # uint8 [3, 32, 32]

Pillow decodes the first frame. 16-bit integers and floating-point numbers are scaled to 8 bits. The orientation of the
camera (EXIF) is applied. Transparent pixels are composited over black, the color of a crop's padding. Pillow's bilinear
filter, which averages over all pixels when it shrinks, resizes the image without keeping its aspect ratio.
docs/images.md lists formats and modes.
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

DEEP = ("I", "F")  # modes with more than 8 bits, as I;16 in any byte order
# A PNG stores its transparent color in the file's bit depth, while Pillow returns pixels in 8 bits. (Pillow keeps the
# upper 8 of 16 bits, so a color that differs only in the lower 8 becomes transparent, too.)
TRANSPARENT_COLOR = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}

# Without any handler Python would print Pillow's records to the terminal.
logging.getLogger("PIL").addHandler(logging.NullHandler())
_stderr_lock = threading.Lock()


class ImageError(RuntimeError):
    """A file cannot be read as an image; the message names the file and the reason, in one line."""


def read_image(path: Path | str, image_size: int) -> Tensor:
    """Return the first image of a file, resized, in any format that Pillow reads.

    Args:
        path: a regular file, or a link to one.
        image_size: height and width of the result, in pixels.

    Returns:
        [3, image_size, image_size], uint8.

    Raises:
        TypeError: path is neither a str nor a PathLike.
        ValueError: image_size is not an integer in 1 … 1024.
        ImageError: the file does not exist or cannot be read, or it holds integers outside 0 … 65535 or floating-point
            numbers outside [0, 1], for which white is unknown.
    """
    check_type("path", path, str, os.PathLike)
    check_integer("image_size", image_size, 1, MAX_IMAGE_SIZE + 1)
    with without_warnings():
        return torch.from_numpy(read_pixels(path, image_size)).permute(2, 0, 1)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings about large images and odd metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_pixels(path: Path | str, image_size: int) -> np.ndarray:
    """Return `read_image`'s image as [image_size, image_size, 3]; call it inside `without_warnings`."""
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
        raise ValueError("is not a regular file")  # reading a named pipe would block
    if status.st_size == 0:
        raise ValueError("the file is empty")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that Pillow reads"
    if isinstance(error, FileNotFoundError):
        return "a broken link" if os.path.islink(error.filename) else "no such file"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _load(image: Image.Image) -> None:
    """Decode the image, apply its EXIF orientation, and convert a PNG's transparent color to 8 bits."""
    if image.format == "JPEG" and image.info.keys().isdisjoint(("exif", "xmp")):
        image.load()  # the quick path for most files
        return
    codec, *_, mode = (getattr(image, "tile", None) or [("", "")])[0]
    with _libtiff_is_quiet() if codec == "libtiff" else nullcontext():
        image.load()
    with suppress(Exception):  # a damaged orientation tag does not make the pixels unusable
        ImageOps.exif_transpose(image, in_place=True)
    scale, color = TRANSPARENT_COLOR.get(mode) if image.format == "PNG" else None, image.info.get("transparency")
    if scale and color is not None:
        image.info["transparency"] = tuple(int(c * scale) for c in color) if mode == "RGB;16B" else color * scale


@contextmanager
def _libtiff_is_quiet() -> Iterator[None]:
    """Suppress libtiff's own messages; Pillow raises an error for each."""
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
    """Return the image over black, in mode RGB or RGBa (colors premultiplied by alpha)."""
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
    """Scale integers in 0 … 65535 (TIFF: 0 … 2^bits - 1) or floating-point numbers in 0 … 1 to mode L."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits = min(tags.get(ExifTags.Base.BitsPerSample, (16,))[0], 16)
    white = 1 if image.mode == "F" else 2**bits - 1
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # not "low < 0 or high > white", which NaN passes
        kind = "floating-point pixels" if image.mode == "F" else "integer pixels"
        raise ValueError(f"its {kind} must be in 0 … {white}, got {low} … {high}: white is unknown")
    gray = np.rint(values * (255 / white)).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # 0 is white; Pillow inverts this only for 8 bits
        gray = 255 - gray
    color = image.info.get("transparency")
    if color is not None:
        gray[values == color] = 0
    return Image.fromarray(gray)
