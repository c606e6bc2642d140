"""An exponential moving average of a model's weights and buffers, without bias towards its beginning.

After t updates with the weights w_1 … w_t and decay d,

    average = (1 - d) · Σ d^(t-k)·w_k / (1 - d^t)

so that the initial weights have no share in it, however short the run (Kingma and Ba 2015, arXiv:1412.6980, section 3,
for the correction; Polyak and Juditsky 1992 for averaging). The class keeps the weighted sum and the sum of its
factors, 1 - d^t. So an update is one pass with a constant factor, which a CUDA graph can hold.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn


class Average:
    """The moving average of a model, as a weighted sum.

    Args:
        model: the model to average; integer buffers are copied.
        decay: d above, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.source = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        self.sums = {name: torch.zeros_like(value) for name, value in self.source.items()}
        like = next(iter(self.sums.values()))
        self.one, self.weight = like.new_ones(()), like.new_zeros(())

    @torch.no_grad()
    def update(self, overflow: Tensor | None = None) -> None:
        """Add the model's current values to the average.

        Args:
            overflow: [], 1 if the step was skipped, so that nothing changes; else 0. None: steps are never skipped.
        """
        values, foreach = [self.one, *self.source.values()], cast(Any, torch)
        if overflow is None:
            foreach._foreach_lerp_(self.tensors(), values, 1 - self.decay)
            return
        # The host does not know whether the step was skipped, so the weight of the new values is a tensor.
        moves = foreach._foreach_sub(values, self.tensors())
        foreach._foreach_mul_(moves, (1 - self.decay) * (1 - overflow))
        foreach._foreach_add_(self.tensors(), moves)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that an update changes."""
        return [self.weight, *self.sums.values()]

    def averaged(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's state dict with the averages in it; before the first update, the model's own."""
        if float(self.weight) == 0:
            return model.state_dict()
        return model.state_dict() | {name: value / self.weight for name, value in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight.copy_(state["weight"])
        for name, value in self.sums.items():
            value.copy_(state["sums"][name])
