"""The fork: two handles to one output, whose gradients meet inside the backward kernel."""

import pytest
import torch
from fused_op import Case, make_operands

from resnet_fast.functional import batch_norm_add_relu

CASE = Case("fork", (2, 20, 5, 5))


def gradients(operands, join, consumers, fork, backend):
    x = operands.x.detach().clone().requires_grad_()
    residual = operands.residual.detach().clone().requires_grad_()
    out = batch_norm_add_relu(
        x,
        *operands.norms[0],
        residual=None if join == "none" else residual,
        residual_norm=operands.norms[1] if join == "bn" else None,
        fork=fork,
        backend=backend,
    )
    first, second = out if fork else (out, out)
    consumers(first, second).backward()
    return x.grad, residual.grad


CONSUMERS = {
    "both": lambda first, second: first.square().sum() + (3 * second).sum(),
    "first alone": lambda first, second: first.square().sum(),
    "second alone": lambda first, second: (3 * second).sum(),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("consumers", "join", "backend"),
    (
        *(("both", join, "triton") for join in ("none", "add", "bn")),
        ("first alone", "none", "triton"),
        ("second alone", "bn", "triton"),
        *((consumers, "bn", "aten") for consumers in CONSUMERS),
    ),
)
def test_gradients_of_the_handles_are_added(consumers, join, backend, device):
    operands = make_operands(CASE, torch.float64, "channels_last", device)
    forked = gradients(operands, join, CONSUMERS[consumers], True, backend)
    plain = gradients(operands, join, CONSUMERS[consumers], False, backend)
    for ours, theirs in zip(forked, plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # fp64, sums in two orders


class Stop(torch.autograd.Function):
    """Passes values on and no gradient back."""

    @staticmethod
    def forward(ctx, *tensors):
        return sum(tensor.sum() for tensor in tensors)

    @staticmethod
    def backward(ctx, gradient):
        return None, None


def test_no_gradient_arrives_at_either_handle(device):
    operands = make_operands(CASE, torch.float32, "channels_last", device)
    x = operands.x.requires_grad_()
    Stop.apply(*batch_norm_add_relu(x, *operands.norms[0], fork=True)).backward()
    assert x.grad is None


def test_the_handles_share_memory(device):
    operands = make_operands(CASE, torch.float32, "channels_last", device)
    first, second = batch_norm_add_relu(operands.x, *operands.norms[0], fork=True)
    assert first.data_ptr() == second.data_ptr()
