"""Ask a trained network about an image file.

An image is prepared as `--dataset folder` prepares those that it trains on: converted to RGB (transparency is dropped)
and resized to image_size x image_size by Pillow's bilinear filter, which averages over all pixels where it shrinks; the
aspect ratio is not kept. Beyond that, the orientation that a camera noted (EXIF) is applied, and 16-bit gray values are
scaled to 8 bits, where Pillow alone would cut them off at 255.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from resnet_fast.checks import check_type
from resnet_fast.data import normalize
from resnet_fast.inference.trained import Trained


class ImageError(RuntimeError):
    """A file cannot be read as an image; the message is the reason, without the name of the file."""


def read_image(path: Path | str, image_size: int) -> Tensor:
    """Return the image of a file, of any size and in any format that Pillow reads; of several, the first.

    Returns:
        [3, image_size, image_size], uint8.

    Raises:
        ImageError: there is no such file, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise ImageError("is a folder; name the images in it, such as FOLDER/*.png")
    if not path.exists():
        raise ImageError("no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and odd metadata: what can be read is read
            with Image.open(path) as image:
                rgb = _to_rgb(ImageOps.exif_transpose(image))
                pixels = np.array(rgb.resize((image_size, image_size), Image.Resampling.BILINEAR))
    except UnidentifiedImageError as error:
        raise ImageError("no image in a format that Pillow reads") from error
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error
    except Exception as error:  # Pillow's decoders raise SyntaxError, ValueError, struct.error …
        raise ImageError(str(error) or type(error).__name__) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


@torch.inference_mode()
def classify(trained: Trained, image: Tensor) -> Tensor:
    """Return the probability of each class, computed in fp32.

    Args:
        trained: on its device.
        image: [3, H, W], uint8, as `read_image` returns it.

    Returns:
        [classes], fp32, on the CPU.

    Raises:
        TypeError, ValueError: an argument is of another type, or the image of another shape.
    """
    check_type("trained", trained, Trained)
    check_type("image", image, Tensor)
    if image.ndim != 3 or len(image) != 3 or image.dtype != torch.uint8:
        raise ValueError(f"image must be [3, H, W], torch.uint8, got {list(image.shape)}, {image.dtype}")
    device = next(trained.model.parameters()).device
    images = normalize(image[None].to(device), trained.mean, trained.std)
    return trained.model(images)[0].float().softmax(0).cpu()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("its pixels are floating-point numbers, of which nothing says what white is")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("its pixels are 32-bit numbers, of which nothing says what white is")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of a palette that is converted to RGB in one step
    return image.convert("RGB")
