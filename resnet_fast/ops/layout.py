"""The memory layout of a tensor: dense, channels_last or not, as an image."""

import torch
from torch import Tensor


def layout(x: Tensor) -> torch.memory_format:
    """The layout in which x: [N, C, ...] is, or would best be made, dense: NCHW, or for 4-D and 5-D channels_last."""
    if x.dim() not in (4, 5):
        return torch.contiguous_format  # as F.batch_norm, whatever the strides
    channels_last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if x.is_contiguous(memory_format=channels_last):
        return channels_last
    if x.is_contiguous() or not _has_channels_last_strides(x):
        return torch.contiguous_format
    return channels_last


def _has_channels_last_strides(x: Tensor) -> bool:
    """torch's rule for tensors with gaps (c10/core/MemoryFormat.h): from C outwards no stride falls short of what lies
    inside it, and where nothing tells the layouts apart, or C is expanded, it is NCHW.
    """
    inside = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.stride(dim) < inside or (dim == 0 and inside == x.stride(1)):
            return False
        inside = x.stride(dim) * x.shape[dim]
    return x.stride(1) != 0


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x without gaps, in its own layout or in that of `like`."""
    return x.contiguous(memory_format=layout(x if like is None else like))


def as_image(x: Tensor) -> Tensor:
    """Dense x: [N, C, ...] as [N, C, H, W] in the same memory."""
    if x.dim() == 2:
        return x[:, :, None, None]
    return x[..., None] if x.dim() == 3 else x.flatten(2, -2)
