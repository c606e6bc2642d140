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


class Settings(NamedTuple):
    """Hold what a pass depends on besides tensors and momenta.

    `ghost_batch_size`: images per group of batch statistics; 0 for all.
    """

    join: Join
    relu: bool
    training: bool
    residual_training: bool
    ghost_batch_size: int = 0
    eps: float = 1e-5
    residual_eps: float = 1e-5


class Inputs(NamedTuple):
    """The tensors and momenta of a pass; the first six may have gradients. Vectors have shape [C]."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual_weight: Tensor | None
    residual_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    residual_running_mean: Tensor | None
    residual_running_var: Tensor | None
    residual_momentum: float

    def norms(self, settings: Settings) -> tuple[BatchNormArgs, BatchNormArgs]:
        """Return the batch norms of x and of the residual."""
        _, _, weight, bias, other_weight, other_bias, mean, var, momentum, other_mean, other_var, other_momentum = self
        _, _, training, other_training, _, eps, other_eps = settings
        other = (other_mean, other_var, other_weight, other_bias, other_training, other_momentum, other_eps)
        return BatchNormArgs(mean, var, weight, bias, training, momentum, eps), BatchNormArgs(*other)


def join_of(residual: object, residual_norm: object) -> Join:
    """Return how a residual, if there is one, enters."""
    return "none" if residual is None else "add" if residual_norm is None else "bn"


def arguments_of(
    x: Tensor,
    norm: BatchNormArgs,
    residual: Tensor | None = None,
    residual_norm: BatchNormArgs | None = None,
    relu: bool = True,
    ghost_batch_size: int = 0,
) -> tuple[Inputs, Settings]:
    """Return the inputs and the settings of a pass, from the arguments of `batch_norm_add_relu`."""
    mean, var, weight, bias, training, momentum, eps = norm
    other_mean, other_var, other_weight, other_bias, other_training, other_momentum, other_eps = (
        residual_norm or NO_NORM
    )
    vectors = (weight, bias, other_weight, other_bias)
    inputs = Inputs(x, residual, *vectors, mean, var, momentum, other_mean, other_var, other_momentum)
    return inputs, Settings(
        join_of(residual, residual_norm), relu, training, other_training, ghost_batch_size, eps, other_eps
    )


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


NO_STATISTICS = Statistics(None, None)  # type: ignore[arg-type]  # of the residual, where it has no batch norm


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
    """What the backward reads: the first six `Inputs`, `residual` for the bn join alone, and the `Outputs` except y."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual_weight: Tensor | None
    residual_bias: Tensor | None
    relu_mask: Tensor | None
    mean: Tensor
    rstd: Tensor
    residual_mean: Tensor | None
    residual_rstd: Tensor | None

    @classmethod
    def of(cls, inputs: Inputs, settings: Settings, outputs: Outputs) -> "Saved":
        """Return what a forward leaves for its backward."""
        residual = inputs.residual if settings.join == "bn" else None
        return cls(inputs.x, residual, *inputs[2:6], *outputs[1:])


class Gradients(NamedTuple):
    """Hold those of the first six `Inputs`; None for an absent input, or where dresidual is dy itself."""

    dx: Tensor
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual_weight: Tensor | None
    dresidual_bias: Tensor | None


def accumulation_type(x: Tensor) -> torch.dtype:
    """fp64 for fp64 data, else fp32: the type of statistics and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
