"""The same operation as eager PyTorch runs it: what CPU tensors get, and what a caller gets by naming "aten"."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import BatchNormArgs


def batch_norm_add_relu(
    x: Tensor,
    norm: BatchNormArgs,
    residual: Tensor | None,
    residual_norm: BatchNormArgs | None,
    relu: bool,
    ghost_batch_size: int = 0,
) -> Tensor:
    """relu(bn(x) + residual), differentiable by torch itself; in place where torchvision's blocks are.

    `ghost_batch_size`: images per group of batch statistics, a group after the other; 0 for all.
    """
    if 0 < ghost_batch_size < len(x):
        groups = x.split(ghost_batch_size)
        residuals = [None] * len(groups) if residual is None else residual.split(ghost_batch_size)
        pairs = zip(groups, residuals, strict=True)
        return torch.cat([batch_norm_add_relu(part, norm, added, residual_norm, relu) for part, added in pairs])
    y = F.batch_norm(x, *norm)
    if residual is not None:
        y += residual if residual_norm is None else F.batch_norm(residual, *residual_norm)
    return F.relu(y, inplace=True) if relu else y
