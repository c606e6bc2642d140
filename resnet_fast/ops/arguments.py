"""The argument and result tuples that operators, launches and functions share."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

# How the residual enters: not at all, as it is (identity shortcut), or behind a batch norm of its own (projection).
Join = Literal["none", "add", "bn"]


class BatchNormArgs(NamedTuple):
    """What one batch norm brings besides its input, in the order of `torch.nn.functional.batch_norm`.

    Vectors have shape [C]. `training` selects batch statistics, which also update the running ones where there are any.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


NO_NORM = BatchNormArgs(None, None)  # in the place of the residual's, where it has none


class PartialStatistics(NamedTuple):
    """Partial results of `statistics_kernel`, [n_groups + n_splits, C, 2].

    First each group's pivot, then each split's shift (its mean is pivot + shift) and centered M2.
    """

    partials: Tensor
    rows_per_split: int


class Statistics(NamedTuple):
    """mean and rstd of the pass, [n_groups, C], as `normalize_kernel` takes them.

    It reads them; or stores them there, from running statistics or, with few `partials`, [1 + n_splits, C, 2], merged
    from these, and then updates the running ones.
    """

    mean: Tensor
    rstd: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    partials: Tensor | None = None
    rows_per_split: int = 1


class Outputs(NamedTuple):
    """What the forward returns. `mean` and `rstd` of the pass, [n_groups, C] ([C] of several processes), are in the
    accumulation type.
    """

    y: Tensor
    relu_mask: Tensor | None
    mean: Tensor
    rstd: Tensor
    residual_mean: Tensor | None
    residual_rstd: Tensor | None


class Saved(NamedTuple):
    """What the backward reads of the forward. `residual` is given for the bn join alone."""

    x: Tensor
    relu_mask: Tensor | None
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    residual_mean: Tensor | None
    residual_rstd: Tensor | None
    residual_weight: Tensor | None
    residual_bias: Tensor | None


def join_of(residual: object, residual_norm: object) -> Join:
    """How a residual, if there is one, enters."""
    if residual is None:
        return "none"
    return "add" if residual_norm is None else "bn"


def saved_of(
    x: Tensor,
    norm: BatchNormArgs,
    residual: Tensor | None,
    residual_norm: BatchNormArgs | None,
    outputs: Outputs,
) -> Saved:
    """What a forward with these arguments and outputs leaves for its backward."""
    forward_tensors = (x, outputs.relu_mask, outputs.mean, outputs.rstd, norm.weight, norm.bias)
    if residual_norm is None:
        return Saved(*forward_tensors, *(None,) * 5)
    residual_statistics = (outputs.residual_mean, outputs.residual_rstd)
    return Saved(*forward_tensors, residual, *residual_statistics, residual_norm.weight, residual_norm.bias)


class Gradients(NamedTuple):
    """What the backward returns; None for what the layer does not have, or where dresidual is dy itself."""

    dx: Tensor
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual: Tensor | None
    dresidual_weight: Tensor | None
    dresidual_bias: Tensor | None


def accumulation_type(x: Tensor) -> torch.dtype:
    """fp64 for fp64 data, else fp32: the type of statistics and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
