"""Memory layouts: find a tensor's layout, make it dense, view it as images."""

import torch
from torch import Tensor


def layout(x: Tensor) -> torch.memory_format:
    """Return the layout of x: [N, C, ...], or the best one to make it dense: NCHW or, in 4-D and 5-D, channels_last."""
    if x.dim() not in (4, 5):
        return torch.contiguous_format  # as in F.batch_norm, for any strides
    channels_last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if x.is_contiguous(memory_format=channels_last):
        return channels_last
    if x.is_contiguous() or not _has_channels_last_strides(x):
        return torch.contiguous_format
    return channels_last


def _has_channels_last_strides(x: Tensor) -> bool:
    """Apply torch's rule for tensors with gaps (c10/core/MemoryFormat.h).

    From C outwards, each stride must span the dimensions inside it. Ambiguous strides, or an expanded C, mean NCHW.
    """
    inside = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.stride(dim) < inside or (dim == 0 and inside == x.stride(1)):
            return False
        inside = x.stride(dim) * x.shape[dim]
    return x.stride(1) != 0


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Return x without gaps, in its own layout or in the layout of `like`."""
    return x.contiguous(memory_format=layout(x if like is None else like))


def as_image(x: Tensor) -> Tensor:
    """View a dense x: [N, C, ...] as [N, C, H, W]."""
    if x.dim() == 2:
        return x[:, :, None, None]
    return x[..., None] if x.dim() == 3 else x.flatten(2, -2)
