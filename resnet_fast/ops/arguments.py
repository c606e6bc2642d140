"""The argument and result tuples that operators, launches and functions share."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

# How the residual enters: not at all, unchanged (identity shortcut), or through its own batch norm (projection).
Join = Literal["none", "add", "bn"]


class BatchNormArgs(NamedTuple):
    """The arguments of one batch norm besides its input, in the order of `torch.nn.functional.batch_norm`.

    Args:
        running_mean, running_var, weight, bias: [C] or None, all of the input's type or, for fp16 and bf16, all fp32.
        training: whether to use batch statistics, which also update the running statistics if given.
        momentum: share of the batch in the updated running statistics.
        eps: added to the variance; may be 0 only without `training`.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


NO_NORM = BatchNormArgs(None, None)  # for a residual without a batch norm


class Settings(NamedTuple):
    """The settings of a pass; `ghost_batch_size`: images per group of batch statistics, 0 for one group of all."""

    join: Join
    relu: bool
    training: bool
    residual_training: bool
    ghost_batch_size: int = 0
    eps: float = 1e-5
    residual_eps: float = 1e-5


class Inputs(NamedTuple):
    """The tensors and momenta of a pass; the first six can have gradients. Vectors have shape [C]."""

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
    """Return how the residual enters, "none" if there is no residual."""
    return "none" if residual is None else "add" if residual_norm is None else "bn"


def arguments_of(
    x: Tensor,
    norm: BatchNormArgs,
    residual: Tensor | None = None,
    residual_norm: BatchNormArgs | None = None,
    relu: bool = True,
    ghost_batch_size: int = 0,
) -> tuple[Inputs, Settings]:
    """Convert the arguments of `batch_norm_add_relu` to the inputs and the settings of a pass."""
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
    """The partial results of `statistics_kernel`, [n_groups + n_splits, C, 2].

    They are each group's pivot, and then each split's shift (its mean is pivot + shift) and centered M2.
    """

    partials: Tensor
    rows_per_split: int


class Statistics(NamedTuple):
    """The statistics that `normalize_kernel` uses: mean and rstd of the pass, [n_groups, C], and their sources.

    With few `partials`, [1 + n_splits, C, 2], the kernel merges them, stores mean and rstd, and updates the running
    statistics. With running statistics alone it computes mean and rstd from them. With neither it reads mean and rstd.
    """

    mean: Tensor
    rstd: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    partials: Tensor | None = None
    rows_per_split: int = 1


NO_STATISTICS = Statistics(None, None)  # type: ignore[arg-type]  # for a residual without a batch norm


class Outputs(NamedTuple):
    """The results of a forward; mean and rstd, [n_groups, C] ([C] over several processes), in the accumulation type."""

    y: Tensor
    relu_mask: Tensor | None
    mean: Tensor
    rstd: Tensor
    residual_mean: Tensor | None
    residual_rstd: Tensor | None


class Saved(NamedTuple):
    """The tensors that the backward reads: six `Inputs`, the residual only in the bn join, and `Outputs` except y."""

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
        """Return the tensors that a forward saves for its backward."""
        residual = inputs.residual if settings.join == "bn" else None
        return cls(inputs.x, residual, *inputs[2:6], *outputs[1:])


class Gradients(NamedTuple):
    """The gradients of the first six `Inputs`; None for an absent input, or if dresidual is dy itself."""

    dx: Tensor
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual_weight: Tensor | None
    dresidual_bias: Tensor | None


def accumulation_type(x: Tensor) -> torch.dtype:
    """Return the type of statistics and sums: fp64 for fp64 data, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
