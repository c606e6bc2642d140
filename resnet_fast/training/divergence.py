"""A loss that became infinite or NaN: at which step, and possible causes."""

import torch
from torch import Tensor, nn

from resnet_fast.training.step import bare


class DivergedError(RuntimeError):
    """The loss became infinite or NaN."""


def check_is_finite(
    losses: Tensor, epoch: int, n_before: int, model: nn.Module, lr: float, precision: str, muon_lr: float | None = None
) -> None:
    """Raise DivergedError, with the number of the first step, if a loss is infinite or NaN.

    Args:
        losses: [n], the losses of the steps that follow the first `n_before` of the epoch.
    """
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        step = int(bad[0])
        where = f"at epoch {epoch}, step {n_before + step + 1}"
        raise DivergedError(
            f"the loss became {float(losses[step])} {where}; {suspects(bare(model), lr, precision, muon_lr)}"
        )


def suspects(model: nn.Module, lr: float, precision: str, muon_lr: float | None = None) -> str:
    """Return possible causes of a loss that is infinite or NaN.

    The running statistics come first: a forward spoils those of the first layer that is not finite and of all layers
    after it, whereas one backward spoils every weight.
    """
    text = f"suspects: the learning rate, {lr:g} there (try a smaller --lr)"
    if muon_lr is not None:
        text += f"; --muon-lr, at most {muon_lr:g}"
    if precision == "fp16":
        text += "; the range of fp16, which ends at 65,504 (try --precision fp32, or bf16 where the GPU computes in it)"
    for kind, tensors in (("running statistics", model.named_buffers()), ("weights", model.named_parameters())):
        named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
        bad = [name for name, tensor in named if not tensor.isfinite().all()]
        if bad:
            text += f"; {len(bad)} of {len(named)} {kind} are not finite, first {bad[0]}"
    return text
