"""[N, C], [N, C, L], [N, C, D, H, W] and beyond are normalized as F.batch_norm does, in every join."""

import pytest
import torch
from fused_op import eager, ours

from resnet_fast.functional import BatchNormArgs, batch_norm_add_relu

SHAPES = {"[N, C]": (5, 6), "[N, C, L]": (3, 6, 7), "5-D": (2, 6, 3, 2, 5), "6-D": (2, 6, 2, 1, 3, 2)}


def operands(shape, device, contiguous=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    vectors = [0.5 + torch.rand(shape[1], generator=generator, dtype=torch.float64) for _ in range(4)]
    images = [image.contiguous(memory_format=contiguous).to(device).requires_grad_() for image in images]
    return images, [vector.to(device).requires_grad_() for vector in vectors]


def results(operation, shape, join, training, device, memory_format=torch.contiguous_format):
    (x, residual), (weight, bias, residual_weight, residual_bias) = operands(shape, device, memory_format)
    running = [torch.full_like(weight, value).detach() for value in (0.1, 1.3, 0.2, 0.9)]
    norms = [
        BatchNormArgs(*running[:2], weight, bias, training, 0.3),
        BatchNormArgs(*running[2:], residual_weight, residual_bias, training, 0.3),
    ]
    y = operation(x, residual, norms, join, True, "triton")
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=device).view(y.shape)).sum().backward()
    leaves = (x, residual, weight, bias, residual_weight, residual_bias)
    return y.detach(), [leaf.grad for leaf in leaves], running


@pytest.mark.parametrize(
    ("shape", "join", "training"),
    (("[N, C]", "bn", True), ("[N, C, L]", "add", True), ("5-D", "bn", False), ("6-D", "none", True)),
)
def test_every_join(shape, join, training, device):
    found, expected = (results(operation, SHAPES[shape], join, training, device) for operation in (ours, eager))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # fp64, sums of at most 60 terms


def test_channels_last_3d_stays(device):
    """Output and gradients are in the layout of the input."""
    found, expected = (
        results(operation, SHAPES["5-D"], "bn", True, device, torch.channels_last_3d) for operation in (ours, eager)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for tensor in (found[0], found[1][0], found[1][1]):
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d)


def test_both_handles_of_a_fork(device):
    (x, residual), _ = operands(SHAPES["5-D"], device)
    first, second = batch_norm_add_relu(x, None, None, training=True, residual=residual, fork=True, backend="triton")
    (first.square().sum() + (3 * second).sum()).backward()
    (x_alone, residual_alone), _ = operands(SHAPES["5-D"], device)
    y = batch_norm_add_relu(x_alone, None, None, training=True, residual=residual_alone, backend="triton")
    (y.square().sum() + (3 * y).sum()).backward()
    assert first.shape == second.shape == x.shape and first.data_ptr() == second.data_ptr()
    torch.testing.assert_close((x.grad, residual.grad), (x_alone.grad, residual_alone.grad), rtol=1e-12, atol=1e-12)
