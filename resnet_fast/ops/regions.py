"""Erase rectangles of a batch's images, or mix them with another image's, in plain PyTorch.

    mixed = weight · x + (1 - weight) · x'   in the rectangle, x elsewhere;   x' is the previous image in the batch
    share = 1 - (1 - weight) · area of the rectangle / area of the image      of x in mixed, and of its label

The first image of the batch is mixed with the last. In mixup the rectangle is the whole image; in CutMix its weight is
0. No shape depends on a value, so a CUDA graph can record every operation.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Mixture(NamedTuple):
    """The labels of mixed images, besides their own.

    Args:
        others: [B], int64, the labels of the images that were mixed in.
        share: [B], fp32, the share of the image's own label.
    """

    others: Tensor
    share: Tensor

    def dominant(self, labels: Tensor) -> Tensor:
        """Return the label with the larger share, [B]; an image's own label if the shares are equal."""
        return torch.where(self.share >= 0.5, labels, self.others)


def is_inside(regions: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels are in the rectangles, [B, 1, height, width], bool.

    Args:
        regions: [B, 4], integers: top, left, height, width.
        height, width: the size of the images.
    """
    top, left, tall, wide = regions[:, :, None].unbind(1)  # [B, 1] each
    i, j = torch.arange(height, device=regions.device), torch.arange(width, device=regions.device)
    is_row, is_column = (i >= top) & (i < top + tall), (j >= left) & (j < left + wide)
    return (is_row[:, :, None] & is_column[:, None, :])[:, None]


def erase(images: Tensor, regions: Tensor) -> Tensor:
    """Return the images, [B, 3, H, W], with 0 in their rectangles, [B, 4] of integers: top, left, height, width.

    Zhong et al. 2017, arXiv:1708.04896.
    """
    return images.masked_fill(is_inside(regions, *images.shape[2:]), 0)


def mix(images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Mixture]:
    """Return each image mixed with the previous one, and the labels that it then shows.

    Args:
        images: [B, 3, H, W], fp32.
        labels: [B], int64.
        draws: [B, 5], int32: weight (the bits of an fp32), top, left, height, width.

    mixup: Zhang et al. 2018, arXiv:1710.09412. CutMix: Yun et al. 2019, arXiv:1905.04899.
    """
    height, width = images.shape[2:]
    weight, regions = draws[:, 0].contiguous().view(torch.float32), draws[:, 1:]
    weights = torch.where(is_inside(regions, height, width), weight[:, None, None, None], 1.0)
    share = 1 - (1 - weight) * (regions[:, 2] * regions[:, 3] / (height * width))
    return images * weights + images.roll(1, 0) * (1 - weights), Mixture(labels.roll(1, 0), share)
