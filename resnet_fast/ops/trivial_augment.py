"""TrivialAugment: one operation per image, drawn with its strength, for a whole batch in plain PyTorch.

Equations and constants are those of torchvision.transforms.v2.TrivialAugmentWide with nearest pixels and black outside
(Müller and Hutter 2021, arXiv:2103.10158). Every operation is computed for every image before one is selected: no shape
depends on a value, so a CUDA graph can record every operation.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

N_STRENGTHS = 31
# The largest magnitude of each operation that has a sign, at strength 30.
SIGNED = {
    "ShearX": 0.99,
    "ShearY": 0.99,
    "TranslateX": 32.0,  # pixels
    "TranslateY": 32.0,
    "Rotate": 135.0,  # degrees
    "Brightness": 0.99,
    "Color": 0.99,
    "Contrast": 0.99,
    "Sharpness": 0.99,
}
OPERATIONS = ("Identity", *SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")
N_OPERATIONS = len(OPERATIONS)


def trivial_augment(images: Tensor, draws: Tensor) -> Tensor:
    """Apply one operation to each image.

    Args:
        images: [B, 3, H, W], fp32, whole numbers 0 … 255.
        draws: [B, 2], integers: the operation's index in OPERATIONS, and its strength, -30 … 30; the sign counts only
            for operations in SIGNED.

    Returns:
        The images, [B, 3, H, W], fp32, whole numbers 0 … 255.
    """
    operation, strength = draws.long().unbind(1)
    rows = _table(*images.shape[2:], images.device)[operation, strength + N_STRENGTHS - 1]  # [B, 8]
    value, rest = rows[:, 6:, None, None, None].unbind(1)  # [B, 1, 1, 1] each
    gray = (images[:, :1] * 0.2989).add(images[:, 1:2], alpha=0.587).add(images[:, 2:], alpha=0.114).floor()
    results = {
        "Brightness": _whole(images * value),
        "Color": _whole(images * value + gray * rest),
        "Contrast": _whole(images * value + gray.mean((1, 2, 3), keepdim=True) * rest),
        "Sharpness": _sharpen(images, rest),
        "Posterize": (images / value).floor() * value,  # value: 2^(8 - bits)
        "Solarize": torch.where(images >= value, 255 - images, images),
        "AutoContrast": _stretch(images),
        "Equalize": _equalize(images),
    }
    y = _warp(images, rows[:, :6])  # by the identity for operations that move no pixel
    for name, result in results.items():
        y = torch.where((operation == OPERATIONS.index(name))[:, None, None, None], result, y)
    return y


def _whole(x: Tensor) -> Tensor:
    """Clamp to 0 … 255 and round down, like a conversion to bytes."""
    return x.clamp(0, 255).floor()


@cache
def _table(height: int, width: int, device: torch.device) -> Tensor:
    """Return [14, 61, 8], fp32: for each operation and strength the 6 numbers of `_source`, value and 1 - value.

    Copy once per size and device: a GPU waits for such a copy, and a CUDA graph cannot contain it.
    """
    rows = []
    for name in OPERATIONS:
        magnitudes = torch.linspace(0, SIGNED.get(name, 1.0), N_STRENGTHS).tolist()
        for strength in range(1 - N_STRENGTHS, N_STRENGTHS):
            magnitude = math.copysign(magnitudes[abs(strength)], strength)
            source = _source(name, magnitude, height, width)
            value = 1 + magnitude if name in SIGNED else 0.0
            if name == "Posterize":
                value = 2.0 ** round(abs(strength) / ((N_STRENGTHS - 1) / 6))  # bits is 8 minus the exponent
            elif name == "Solarize":
                value = 255 * torch.linspace(1, 0, N_STRENGTHS)[abs(strength)].item()
            rows.append([*source, value, 1 - value])
    with torch.inference_mode(False):
        table = torch.tensor(rows, dtype=torch.float64).float()
        return table.view(N_OPERATIONS, 2 * N_STRENGTHS - 1, 8).to(device)


def _source(name: str, magnitude: float, height: int, width: int) -> tuple[float, ...]:
    """Return a … f of (x, y) -> (a·x + b·y + c, d·x + e·y + f), from a pixel to its source; (0, 0) is the center."""
    if name == "ShearX":  # the upper edge does not move
        return 1, magnitude, magnitude * height / 2, 0, 1, 0
    if name == "ShearY":
        return 1, 0, 0, magnitude, 1, magnitude * width / 2
    if name == "TranslateX":
        return 1, 0, -int(magnitude), 0, 1, 0
    if name == "TranslateY":
        return 1, 0, 0, 0, 1, -int(magnitude)
    angle = math.radians(magnitude) if name == "Rotate" else 0.0
    cos, sin = math.cos(angle), math.sin(angle)
    return cos, -sin, 0, sin, cos, 0


def _warp(images: Tensor, source: Tensor) -> Tensor:
    """Move the pixels of the images by the maps `source`, [B, 6], of `_source`; pixels from outside are black."""
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) + (1 - width) / 2
    y = (torch.arange(height, device=images.device) + (1 - height) / 2)[:, None]
    a, b, c, d, e, f = source[:, :, None, None].unbind(1)  # [B, 1, 1] each
    # In units of half the image, with torchvision's operations in the same order, so that a source halfway between two
    # pixels is rounded to the same pixel.
    half_x, half_y = width / 2, height / 2
    grid_x = x * (a / half_x) + y * (b / half_x) + c / half_x
    grid_y = x * (d / half_y) + y * (e / half_y) + f / half_y
    grid = torch.stack([grid_x, grid_y], -1)
    return F.grid_sample(images, grid, "nearest", "zeros", align_corners=False)


def _sharpen(images: Tensor, rest: Tensor) -> Tensor:
    """Move inner pixels away from, or towards, the weighted mean of their 3x3 pixels (weight 5 of 13 in the middle)."""
    inner = images[:, :, 1:-1, 1:-1]
    if inner.numel() == 0:
        return images
    blurred = ((F.avg_pool2d(images, 3, 1, divisor_override=1) + 4 * inner) / 13).round()
    return F.pad(_whole(inner + (blurred - inner) * rest) - inner, (1, 1, 1, 1)) + images


def _stretch(images: Tensor) -> Tensor:
    """Map the darkest pixel of each channel to 0 and the brightest to 255."""
    least, most = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    is_flat = least == most
    scale = torch.where(is_flat, 1.0, (most - least) * (1 / 255))
    return _whole((images - torch.where(is_flat, 0.0, least)) / scale)


def _equalize(images: Tensor) -> Tensor:
    """Give each channel a flat histogram, by the integers of Pillow's ImageOps.equalize."""
    flat = images.flatten(2).contiguous()  # [B, 3, H·W]
    n_pixels = flat.shape[2]
    # Sort to count: with deterministic algorithms, scatter_add_ may wait for the GPU.
    bytes_ = torch.arange(256.0, device=images.device).expand(*flat.shape[:2], 256).contiguous()
    darker = torch.searchsorted(flat.sort(2).values, bytes_)  # pixels below each value, [B, 3, 256]
    flat = flat.long()
    n_brightest = n_pixels - darker.gather(2, flat.amax(2, keepdim=True))
    step = (n_pixels - n_brightest) // 255
    levels = ((darker + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, levels.gather(2, flat), flat).view_as(images).float()
