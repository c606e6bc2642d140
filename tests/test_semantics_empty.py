"""A tensor without elements is normalized as F.batch_norm does: shape, zero gradients, untouched statistics."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fast import FusedBatchNorm2d
from resnet_fast.functional import BatchNormArgs, batch_norm_add_relu
from resnet_fast.models.resnet import BasicBlock
from resnet_fast.ops.checks import FLOATING

SHAPES = {
    "no images": (0, 4, 3, 3),
    "no rows": (2, 4, 0, 3),
    "no images, 2-D": (0, 4),
    "no images, 5-D": (0, 4, 3, 2, 2),
    "1-D": (0,),
}


def results(function, shape, training: bool, dtype, device, affine: bool):
    n_channels = shape[1] if len(shape) > 1 else 0
    x = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    running_mean, running_var, weight, bias = (
        torch.full((n_channels,), value, dtype=dtype, device=device) for value in (0.5, 2.0, 3.0, -1.0)
    )
    parameters = [weight.requires_grad_(), bias.requires_grad_()] if affine else [None, None]
    y = function(x, running_mean, running_var, *parameters, training)
    y.sum().backward()
    return [y.detach(), x.grad, running_mean, running_var] + [p.grad for p in parameters if p is not None]


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("shape", SHAPES)
def test_function(shape, training, device):
    for dtype in FLOATING:
        for affine in (True, False) if len(SHAPES[shape]) > 1 else (False,):
            found, expected = (
                results(function, SHAPES[shape], training, dtype, device, affine)
                for function in (lambda *args: batch_norm_add_relu(*args, relu=False), F.batch_norm)
            )
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
                assert torch.equal(ours, theirs)


def test_no_channels(device):
    """torch takes them without weight and bias; what it says of a weight without elements, we say."""
    x, vector = torch.empty(2, 0, 3, 3, device=device), torch.empty(0, device=device)
    assert batch_norm_add_relu(x, vector, vector, training=True).shape == x.shape
    with pytest.raises(IndexError) as theirs:
        F.batch_norm(x, vector, vector, vector, vector, True)
    with pytest.raises(IndexError) as ours:
        batch_norm_add_relu(x, vector, vector, vector, vector, True)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("training", (True, False), ids=("training", "frozen"))
def test_joins_and_fork(training, device):
    vectors = [torch.full((4,), value, device=device) for value in (0.5, 2.0, 3.0, -1.0)]
    norm = BatchNormArgs(vectors[0], vectors[1], vectors[2].requires_grad_(), vectors[3].requires_grad_(), training)
    for residual_norm in (None, norm):
        x, residual = (torch.empty(0, 4, 3, 3, device=device, requires_grad=True) for _ in range(2))
        outputs = batch_norm_add_relu(x, *norm, residual=residual, residual_norm=residual_norm, fork=True)
        sum(y.sum() for y in outputs).backward()
        assert x.grad.shape == residual.grad.shape == x.shape
        assert torch.equal(norm.weight.grad, torch.zeros_like(norm.weight))
    assert torch.equal(norm.running_mean, torch.full_like(norm.running_mean, 0.5))


def test_triton_by_name_says_why_not(device):
    with pytest.raises(RuntimeError, match="backend 'triton' was asked for, but x has no elements"):
        batch_norm_add_relu(torch.empty(0, 4, 3, 3, device=device), None, None, training=True, backend="triton")


@pytest.mark.parametrize("momentum", (0.1, None))
def test_module_counts_the_batch_as_torchs_does(momentum, device):
    for training in (True, False):
        states = []
        for module in (FusedBatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)):
            module.to(device).train(training)(torch.randn(2, 4, 3, 3, device=device).sign())
            module(torch.empty(0, 4, 3, 3, device=device)).sum().backward()
            states.append((dict(module.named_buffers()), [p.grad for p in module.parameters()]))
        assert states[0][0]["num_batches_tracked"] == (2 if training else 0)
        assert torch.equal(states[0][0]["num_batches_tracked"], states[1][0]["num_batches_tracked"])
        assert all(not gradient.any() for gradient in states[0][1] + states[1][1])


def test_a_block_with_a_projection(device):
    downsample = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2, bias=False), FusedBatchNorm2d(8))
    block = BasicBlock(4, 8, 2, downsample, norm_layer=FusedBatchNorm2d).to(device)
    x = torch.empty(0, 4, 6, 6, device=device, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.shape == x.shape
    assert [int(n.num_batches_tracked) for n in (block.bn1, block.bn2, downsample[1])] == [1, 1, 1]
