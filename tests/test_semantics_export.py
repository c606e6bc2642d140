"""torch.export of a batch norm and of the network gives a program with the outputs, gradients and buffers of the module."""

import copy

import pytest
import torch
from torch import nn

from resnet_fast import FusedBatchNorm2d, resnet18


class Block(nn.Module):
    """Both joins and the fused fork, as the network uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = (FusedBatchNorm2d(8) for _ in range(3))

    def forward(self, x):
        y, alias = self.first.fused(x, relu=True, fork=True)
        return self.second.fused(y, alias, self.shortcut, relu=True)


MODULES = {
    "batch norm": lambda: FusedBatchNorm2d(8),
    "batch norm + ReLU": lambda: FusedBatchNorm2d(8, relu=True),
    "no affine, no statistics": lambda: FusedBatchNorm2d(8, affine=False, track_running_stats=False),
    "block": Block,
}


def outcome(module, x) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


@pytest.mark.parametrize("strict", (False, True), ids=("not strict", "strict"))
@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("name", MODULES)
def test_module(name, training, strict, either_backend, device):
    module = MODULES[name]().to(device).train(training)
    x = torch.randn(3, 8, 4, 5, device=device)
    program = torch.export.export(copy.deepcopy(module), (x,), strict=strict)
    found, expected = outcome(program.module(), x), outcome(module, x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
