"""The backend "aten": batch norm + residual + ReLU in eager PyTorch, the default for CPU tensors."""

import torch
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
    """Compute relu(bn(x) + residual) with differentiable operators, in place wherever torchvision's blocks are.

    `ghost_batch_size`: images per group of batch statistics, in order; 0 for one group of all images.
    """
    if 0 < ghost_batch_size < len(x):
        groups = x.split(ghost_batch_size)
        residuals = [None] * len(groups) if residual is None else residual.split(ghost_batch_size)
        pairs = zip(groups, residuals, strict=True)
        return torch.cat([batch_norm_add_relu(part, norm, added, residual_norm, relu) for part, added in pairs])
    y = _batch_norm(x, *norm)
    if residual is not None:
        if residual.dtype != x.dtype:
            residual = residual.to(x.dtype)
        y += residual if residual_norm is None else _batch_norm(residual, *residual_norm)
    return torch.relu_(y) if relu else y


def _batch_norm(x: Tensor, mean, var, weight, bias, training: bool, momentum: float, eps: float) -> Tensor:
    """Compute F.batch_norm without its check of the size, which has been made already."""
    return torch.batch_norm(x, weight, bias, mean, var, training, momentum, eps, torch.backends.cudnn.enabled)
