"""Lookahead (Zhang et al. 2019, arXiv:1907.08610) as in airbench (Jordan 2024, arXiv:2404.00498).

After every fifth step t of T, and after the last,

    slow = decay·slow + (1 - decay)·weights,   weights = slow,   decay = 0.95^5·(t / T)^3

so that the weights move freely at first and are averaged ever more strongly. The slow weights start as the initial
ones. Running statistics are averaged likewise. (airbench discards the steps after the last multiple of five.)
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

EVERY = 5  # steps
DECAY = 0.95**EVERY


class Lookahead:
    """The slow weights of a model.

    Args:
        model: the model whose parameters and floating-point buffers are averaged in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.fast = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        self.slow = {name: value.clone() for name, value in self.fast.items()}

    @torch.no_grad()
    def update(self, n_done: int, n_steps: int) -> None:
        """Average the weights, if that is due after `n_done` of `n_steps` steps.

        This costs two launches in five steps, outside of the step's CUDA graph, and never waits for the GPU.
        """
        if n_done % EVERY and n_done != n_steps:
            return
        decay = DECAY * (n_done / n_steps) ** 3
        slow, fast, foreach = [*self.slow.values()], [*self.fast.values()], cast(Any, torch)
        foreach._foreach_lerp_(slow, fast, 1 - decay)
        foreach._foreach_copy_(fast, slow)

    def state_dict(self) -> dict[str, Tensor]:
        return self.slow
