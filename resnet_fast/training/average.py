"""An exponential moving average of a model's weights and buffers, without a bias towards its beginning.

After t updates with the weights w_1 … w_t and decay d,

    average = (1 - d) · Σ d^(t-k)·w_k / (1 - d^t)

so that the initial weights have no share in it however short the run (Kingma and Ba 2015, arXiv:1412.6980, section 3,
for the correction; Polyak and Juditsky 1992 for averaging). Kept is the sum: an update is one pass with a constant
factor, which a CUDA graph can hold.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """The sum, beside the model that it is of.

    Args:
        model: whose parameters and buffers are averaged; integer buffers are copied.
        decay: d above, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.source = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        self.sums = {name: torch.zeros_like(value) for name, value in self.source.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model as it is."""
        sums, values = list(self.sums.values()), list(self.source.values())
        torch._foreach_lerp_(sums, values, 1 - self.decay)  # type: ignore[attr-defined]

    def averaged(self, model: nn.Module, n_updates: int) -> dict[str, Tensor]:
        """Return the model's state dict with averages in place of what is averaged; of no update, as it is."""
        if n_updates == 0:
            return model.state_dict()
        bias = 1 - self.decay**n_updates
        return model.state_dict() | {name: value / bias for name, value in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return self.sums

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.sums.items():
            value.copy_(state[name])
