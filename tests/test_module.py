"""FusedBatchNorm2d is nn.BatchNorm2d: modes, buffers, keys; plus the residual and ReLU.

What is asked here is whether a mode is the right one, and a wrong one is off by percents. How exact the numbers are is
the parity tests' claim; the tolerances here are some hundred fp32 roundings, or as many low-precision ones as named.
"""

import pytest
import torch
from torch import nn

from resnet_fast import FusedBatchNorm2d

OPTIONS = (
    {},
    {"momentum": None},
    {"momentum": 0.37, "eps": 1e-3},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
)


def run(module: nn.Module, batches: list[torch.Tensor]):
    """Outputs and gradients of three training batches and one evaluation."""
    found = []
    for index, batch in enumerate(batches):
        module.train(index < len(batches) - 1)
        x = batch.clone().requires_grad_()
        y = module(x)
        (y * torch.linspace(-1, 2, y.numel(), device=y.device).view_as(y)).sum().backward()
        found += [y.detach(), x.grad]
    return found + [p.grad for p in module.parameters()] + [b.double() for b in module.buffers()]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_modes_and_buffers(options, device):
    ours, theirs = FusedBatchNorm2d(12, **options).to(device), nn.BatchNorm2d(12, **options).to(device)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.manual_seed(0)
    batches = [2 + 3 * torch.randn(3, 12, 5, 4, device=device) for _ in range(4)]
    for found, expected in zip(run(ours, batches), run(theirs, batches), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_relu_and_residual(device):
    module = FusedBatchNorm2d(8, relu=True).to(device)
    x, residual = torch.randn(2, 8, 4, 4, device=device), torch.randn(2, 8, 4, 4, device=device)
    expected = torch.relu(nn.BatchNorm2d(8).to(device)(x) + residual)
    torch.testing.assert_close(module(x, residual), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module(input=x, residual=residual), expected, rtol=1e-5, atol=1e-5)


def test_repr():
    assert repr(FusedBatchNorm2d(8)) == repr(nn.BatchNorm2d(8)).replace("BatchNorm2d", "FusedBatchNorm2d")
    assert repr(FusedBatchNorm2d(8, relu=True)).endswith("track_running_stats=True, relu=True)")


def test_residual_of_another_type(device):
    """As `out += identity` of torchvision's blocks: the result keeps the type of the normalized tensor."""
    ours = FusedBatchNorm2d(8, relu=True).to(device)
    theirs = nn.BatchNorm2d(8).to(device)
    x = torch.randn(2, 8, 4, 4, device=device)
    residual = x.clone().requires_grad_()
    found = ours(x.bfloat16(), residual)
    expected = theirs(x.bfloat16())
    expected += x
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.relu(), rtol=2**-6, atol=2**-6)  # two bf16 roundings
    found.sum().backward()
    assert residual.grad.dtype == torch.float32


def test_relu_is_a_bool():
    with pytest.raises(TypeError, match="relu must be of type bool, got str"):
        FusedBatchNorm2d(8, relu="yes")
