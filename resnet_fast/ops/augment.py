"""A training batch from bytes: gather, crop, mirror, cutout, normalize and cast, in one kernel or in plain PyTorch.

Equations A1 to A3: kernels/augment.py. The two implementations are bit-identical.
"""

from functools import cache

import torch
from torch import Tensor

from .backend import augment_launch, choose_backend, device_guard

N_DRAWS = 6  # int32 per image of a plan: index, shift_y, shift_x, mirror, cut_y, cut_x


def augment(
    images: Tensor,
    labels: Tensor,
    plan: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    padding: int = 0,
    reflect: bool = False,
    cutout: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return the batch that `plan` describes.

    Args:
        images: [N, 3, H, W], uint8, channels_last.
        labels: [N], int64.
        plan: [B, 6], int32, on the device of the images: index, shift_y, shift_x, mirror, cut_y, cut_x.
        mean, std: the statistics of each channel, for pixels in [0, 1].
        padding: how many pixels a crop may reach beyond each edge; 0 for no crop.
        reflect: whether pixels beyond the edge are reflected, instead of black.
        cutout: the side of the square that is set to 0 (the mean color), in pixels; 0 for none.
        dtype: the type of the result.

    Returns:
        The images, [B, 3, H, W] in `dtype`, channels_last, and their labels, [B], int64.

    Raises:
        ValueError: `images`, `labels` or `plan` are not as above, or with `reflect` the padding is not below H and W.

    Cutout is from DeVries and Taylor 2017, arXiv:1708.04552.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [N, 3, H, W], torch.uint8, got {list(images.shape)}, {images.dtype}")
    if not images.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"images must be channels_last, got strides {images.stride()}")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be [{len(images)}], torch.int64, got {list(labels.shape)}, {labels.dtype}")
    if not images.device == labels.device == plan.device:
        raise ValueError(f"labels and plan must be on {images.device}, got {labels.device} and {plan.device}")
    if plan.shape[1:] != (N_DRAWS,) or plan.dtype != torch.int32:
        raise ValueError(f"plan must be [B, {N_DRAWS}], torch.int32, got {list(plan.shape)}, {plan.dtype}")
    if reflect and padding >= min(images.shape[2:]):
        raise ValueError(f"padding must be below {min(images.shape[2:])} with reflect, got {padding}")
    shift = tuple(255 * value for value in mean)
    scale = tuple(1 / (255 * value) for value in std)
    if choose_backend(images) == "triton":
        with device_guard(images):
            return augment_launch.augment(
                images, labels, plan.contiguous(), shift, scale, padding, reflect, cutout, dtype
            )
    return _augment(images, labels, plan, shift, scale, padding, reflect, cutout, dtype)


@cache
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return [C], fp32. Copy once per device: a GPU waits for such a copy, and a CUDA graph cannot contain it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def _augment(
    images: Tensor,
    labels: Tensor,
    plan: Tensor,
    shift: tuple[float, ...],
    scale: tuple[float, ...],
    padding: int,
    reflect: bool,
    cutout: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute `augment_launch.augment` in plain PyTorch."""
    height, width = images.shape[2:]
    index, shift_y, shift_x, mirror, cut_y, cut_x = plan.long()[:, :, None].unbind(1)  # [B, 1] each
    i, j = torch.arange(height, device=plan.device), torch.arange(width, device=plan.device)
    row = i + shift_y - padding  # [B, H]
    column = torch.where(mirror != 0, width - 1 - j, j) + shift_x - padding  # [B, W]
    if reflect:
        row, column = (_reflect(at, size) for at, size in ((row, height), (column, width)))
    is_row, is_column = (row >= 0) & (row < height), (column >= 0) & (column < width)
    # Indices around a slice put the sliced channels last, as they are in memory.
    row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
    x = images[index[:, :, None], :, row[:, :, None], column[:, None, :]]  # [B, H, W, 3]
    x = x * (is_row[:, :, None] & is_column[:, None, :])[..., None]
    y = (x.float() - per_channel(shift, plan.device)) * per_channel(scale, plan.device)
    if cutout:
        is_cut = ((i >= cut_y) & (i < cut_y + cutout))[:, :, None] & ((j >= cut_x) & (j < cut_x + cutout))[:, None, :]
        y = y.masked_fill(is_cut[..., None], 0)
    return y.to(dtype).permute(0, 3, 1, 2), labels[index[:, 0]]


def _reflect(at: Tensor, size: int) -> Tensor:
    at = at.abs()
    return torch.where(at < size, at, 2 * (size - 1) - at)
