"""Progressive resizing: the first steps use smaller images, which cost less (Howard 2018; fast.ai's DAWNBench entry).

Each size has an equal share of the run's steps, in ascending order; the last step always has the last size. Images are
reduced after augmentation, by bilinear interpolation with antialiasing: an output pixel is the mean of the pixels under
a triangle twice as wide as itself. Batch norm's statistics depend on the size, so they restart with each size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.training.options import sizes_in


class Sizes:
    """The image size of each step.

    Args:
        text: the sizes, as in a recipe: "16,24,32".
        n_steps: number of steps of the whole run.
    """

    def __init__(self, text: str, n_steps: int) -> None:
        self.text, self.sizes, self.n_steps = text, sizes_in(text), n_steps

    def at(self, step: int) -> int:
        """Return the size at a step, counted from 0."""
        left = max(self.n_steps - 1 - step, 0)
        return self.sizes[len(self.sizes) - 1 - left * len(self.sizes) // self.n_steps]

    def check(self, height: int, width: int) -> None:
        """Raise ValueError unless the last size is the images' own."""
        if not height == width == self.sizes[-1]:
            raise ValueError(f"sizes must end with the images' own, {height}x{width}, got {self.text}")


def resized(images: Tensor, size: int) -> Tensor:
    """Return images, [N, C, H, W], as [N, C, size, size] in channels_last and their own type."""
    smaller = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return smaller.to(images.dtype, memory_format=torch.channels_last)


@contextmanager
@torch.no_grad()
def fresh_statistics(model: nn.Module) -> Iterator[None]:
    """Restart the running statistics, so that only the forwards in this context count.

    From 0, k updates give the batch statistics a total weight of 1 - (1 - momentum)^k, by which the result is divided.
    """
    norms: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.training
        and module.track_running_stats
        and module.momentum is not None  # a cumulative average has no share to divide by
    ]
    before = [norm.num_batches_tracked.clone() for norm in norms]
    for norm in norms:
        norm.running_mean.zero_()
        norm.running_var.zero_()
    yield
    for norm, n_before in zip(norms, before, strict=True):
        share = 1 - (1 - norm.momentum) ** (norm.num_batches_tracked - n_before)
        norm.running_mean.div_(share)
        norm.running_var.div_(share)
