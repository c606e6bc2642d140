"""torch.compile(fullgraph=True) of the model computes what eager mode computes."""

import pytest
import torch
import torch.nn.functional as F

from resnet_fast import resnet18


@pytest.mark.parametrize("stem", ("cifar", "imagenet"))
def test_loss_gradients_and_buffers(stem, device):
    def run(compiled: bool):
        torch.manual_seed(0)
        model = resnet18(num_classes=10, stem=stem).to(device)
        x, target = torch.randn(2, 3, 32, 32, device=device), torch.tensor([1, 7], device=device)
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


def test_inductor_trains_a_block(device):
    """The default compiler once for real, on a block small enough for every run of the tests."""
    from resnet_fast.models.resnet import BasicBlock
    from resnet_fast.nn import FusedBatchNorm2d

    torch.manual_seed(0)
    block = BasicBlock(8, 8, norm_layer=FusedBatchNorm2d).to(device)
    x = torch.randn(2, 8, 6, 6, device=device)

    def gradients(forward):
        block.zero_grad()
        forward(x).square().sum().backward()
        return [p.grad.clone() for p in block.parameters()]

    expected = gradients(block)
    for ours, theirs in zip(gradients(torch.compile(block, fullgraph=True)), expected, strict=True):
        # Inductor may reorder a convolution's sums: a few roundings of the largest gradient.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
