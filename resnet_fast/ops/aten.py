"""The same operation as eager PyTorch runs it: what CPU tensors get, and what a caller gets by naming "aten"."""

import torch.nn.functional as F
from torch import Tensor

from .arguments import BatchNormArgs


def batch_norm_add_relu(
    x: Tensor, norm: BatchNormArgs, residual: Tensor | None, residual_norm: BatchNormArgs | None, relu: bool
) -> Tensor:
    """relu(bn(x) + residual), differentiable by torch itself; in place where torchvision's blocks are."""
    y = F.batch_norm(x, *norm)
    if residual is not None:
        y += residual if residual_norm is None else F.batch_norm(residual, *residual_norm)
    return F.relu(y, inplace=True) if relu else y
