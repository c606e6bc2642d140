"""torch.compile(fullgraph=True) of the model computes what eager mode computes."""

import pytest
import torch
import torch.nn.functional as F
from thin_resnet import thin_resnet

from resnet_fast import FusedBatchNorm2d
from resnet_fast.models import resnet


@pytest.mark.gpu
def test_loss_gradients_and_buffers(device):
    def run(compiled: bool):
        model = thin_resnet(resnet).to(device)
        generator = torch.Generator().manual_seed(1)
        x, target = torch.randn(2, 3, 16, 16, generator=generator).to(device), torch.tensor([1, 2], device=device)
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        loss = F.cross_entropy(forward(x), target)
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())

    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        loss, gradients, buffers = run(compiled=True)
        expected_loss, expected_gradients, expected_buffers = run(compiled=False)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected_gradients.items():
        assert torch.equal(gradients[name], gradient), name
    for name, buffer in expected_buffers.items():
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.slow
def test_inductor_trains_a_block(device):
    """The default compiler once for real, on a block small enough for every run of the tests."""
    torch.manual_seed(0)
    block = resnet.BasicBlock(8, 8, norm_layer=FusedBatchNorm2d).to(device)
    x = torch.randn(2, 8, 6, 6, device=device)

    def gradients(forward):
        block.zero_grad()
        forward(x).square().sum().backward()
        return [p.grad.clone() for p in block.parameters()]

    expected = gradients(block)
    for ours, theirs in zip(gradients(torch.compile(block, fullgraph=True)), expected, strict=True):
        # Inductor may reorder a convolution's sums: a few roundings of the largest gradient.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
