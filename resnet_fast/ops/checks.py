"""Checks of the arguments of `batch_norm_add_relu`, as in F.batch_norm and in the same order."""

import math
from numbers import Real

import torch
from torch import Tensor

from . import distributed
from .arguments import BatchNormArgs

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NUMBERS = (float, int, Real, Tensor, torch.SymFloat, torch.SymInt)  # torch accepts these, also NumPy's, as a float
VECTORS = BatchNormArgs._fields[:4]  # running_mean, running_var, weight, bias


def check_arguments(
    x: Tensor,
    norm: BatchNormArgs,
    residual: Tensor | None,
    residual_norm: BatchNormArgs | None,
    group: distributed.Group | None = None,
    ghost_batch_size: int | None = None,
) -> None:
    """Raise the errors that `batch_norm_add_relu` documents, in the order of F.batch_norm."""
    check_ghost_batch_size(ghost_batch_size)
    if residual_norm is not None and not isinstance(residual_norm, BatchNormArgs):
        raise TypeError(f"residual_norm must be a BatchNormArgs, got {type(residual_norm).__name__}")
    if norm.training or (residual_norm is not None and residual_norm.training):
        _check_batch_size(x, group, ghost_batch_size)
    _check_settings("", norm)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if x.dim() < 2 and x.numel() > 0:
        raise RuntimeError(f"x must be [N, C, ...], got {x.dim()}-D {tuple(x.shape)}")
    _check_vectors("", x, norm)
    if residual is None and residual_norm is not None:
        raise ValueError("residual_norm needs a residual, got residual=None")
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"residual must be a Tensor, got {type(residual).__name__}")
        if residual.dtype not in FLOATING:
            raise TypeError(f"residual must be fp16, bf16, fp32 or fp64, got {residual.dtype}")
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
        if residual.device != x.device:
            raise ValueError(f"residual must be on x's device {x.device}, got {residual.device}")
        if residual_norm is not None:
            _check_settings("residual_norm.", residual_norm)
            _check_vectors("residual_norm.", x, residual_norm)


def _check_batch_size(x: Tensor, group: distributed.Group | None, ghost_batch_size: int | None) -> None:
    """Raise if a group has one value per channel, which has no variance; an x without dimensions fails later."""
    if group is not None:
        if ghost_batch_size is not None:
            raise ValueError(
                f"ghost_batch_size must be None if several processes share batch statistics, got {ghost_batch_size}"
            )
        return
    if not isinstance(x, Tensor) or x.dim() == 0:
        return
    for group_size in _group_sizes(x, ghost_batch_size):
        if math.prod((group_size, *x.shape[2:])) == 1:
            # torch's own rule and wording (torch.nn.functional._verify_batch_size)
            size = torch.Size((group_size, *x.shape[1:]))
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")


def check_ghost_batch_size(value: int | None) -> None:
    """Raise unless the value is a positive number of images, or None."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"ghost_batch_size must be an int or None, got {value!r}")
    if value < 1:
        raise ValueError(f"ghost_batch_size must be at least 1, got {value}")


def count_groups(x: Tensor, ghost_batch_size: int | None) -> int:
    """Return the number of groups with batch statistics of their own; as in torch, no images still make one batch."""
    return 1 if ghost_batch_size is None else max(1, -(-x.shape[0] // ghost_batch_size))


def _group_sizes(x: Tensor, ghost_batch_size: int | None) -> tuple[int, int]:
    """Return the number of images in the first and in the last group, the largest and the smallest."""
    first = x.shape[0] if ghost_batch_size is None else min(ghost_batch_size, x.shape[0])
    return first, x.shape[0] - (count_groups(x, ghost_batch_size) - 1) * first


def _check_settings(prefix: str, norm: BatchNormArgs) -> None:
    """Check the numbers, and that vectors are tensors; messages begin with `prefix`, the norm's name."""
    if not isinstance(norm.eps, NUMBERS):
        raise TypeError(f"{prefix}eps must be a number, got {norm.eps!r}")
    if norm.training and norm.eps <= 0:
        raise ValueError(f"{prefix}eps must be positive when training, got {norm.eps}")
    if norm.eps < 0:
        raise ValueError(f"{prefix}eps must be non-negative, got {norm.eps}")
    if not isinstance(norm.momentum, NUMBERS):
        raise TypeError(f"{prefix}momentum must be a number, got {norm.momentum!r}")
    for name, vector in zip(VECTORS, norm[:4], strict=True):
        if vector is not None and not isinstance(vector, Tensor):
            raise TypeError(f"{prefix}{name} must be a Tensor, got {type(vector).__name__}")


def _check_vectors(prefix: str, x: Tensor, norm: BatchNormArgs) -> None:
    """Check the vectors against x; messages begin with `prefix`, the norm's name."""
    n_channels = x.shape[1] if x.dim() > 1 else 0
    given = {name: vector for name, vector in zip(VECTORS, norm[:4], strict=True) if vector is not None}
    for name, vector in given.items():
        if vector.shape != (n_channels,):
            raise RuntimeError(f"{prefix}{name} must have shape ({n_channels},), got {tuple(vector.shape)}")
        if vector.device != x.device:
            raise RuntimeError(f"{prefix}{name} must be on x's device {x.device}, got {vector.device}")
        if name.startswith("running") and vector.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{prefix}{name} must not require a gradient, got requires_grad=True")
    if norm.training and (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{prefix}running_mean and {prefix}running_var must be given both or neither")
    if not norm.training and x.numel() > 0 and (norm.running_mean is None or norm.running_var is None):
        raise RuntimeError(f"{prefix}running_mean and {prefix}running_var must be given when training is False")
    if x.dtype not in FLOATING:
        raise NotImplementedError(f"x must be fp16, bf16, fp32 or fp64, got {x.dtype}")
    dtypes = {vector.dtype for vector in given.values()}
    allowed = (x.dtype, torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else (x.dtype,)
    if len(dtypes) > 1 or not dtypes.issubset(allowed):
        got = ", ".join(f"{name} {vector.dtype}" for name, vector in given.items())
        raise RuntimeError(
            f"{prefix}vectors must all be {' or all '.join(map(str, allowed))} for x of {x.dtype}, got {got}"
        )
