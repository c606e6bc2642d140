"""The gradients are the derivatives: gradcheck in fp64 of the interpreted kernels, of ATen and of the reference."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from resnet_fast.functional import BatchNormArgs, batch_norm_add_relu
from resnet_fast.ops import reference

JOINS = ("none", "add", "bn")
SHAPE = (2, 3, 2, 2)


def leaves(device) -> list[torch.Tensor]:
    """x, residual and two pairs of weight and bias, fp64; values away from ReLU's kink."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2)]
    vectors = [0.5 + torch.rand(SHAPE[1], generator=generator, dtype=torch.float64) for _ in range(4)]
    return [tensor.to(device).requires_grad_() for tensor in (*images, *vectors)]


def operation(join: str, relu: bool, training: bool, backend: str, fork: bool = False):
    def run(x, residual, weight, bias, residual_weight, residual_bias):
        running = (None, None) if training else (torch.zeros_like(weight) + 0.1, torch.ones_like(weight) * 1.3)
        return batch_norm_add_relu(
            x,
            *running,
            weight,
            bias,
            training,
            residual=None if join == "none" else residual,
            residual_norm=BatchNormArgs(*running, residual_weight, residual_bias, training) if join == "bn" else None,
            relu=relu,
            fork=fork,
            backend=backend,
        )

    return run


@pytest.mark.parametrize("backend", ("triton", "aten"))
@pytest.mark.parametrize("training", (True, False), ids=("training", "frozen"))
@pytest.mark.parametrize("relu", (True, False), ids=("relu", "linear"))
@pytest.mark.parametrize("join", JOINS)
def test_gradients(join, relu, training, backend, device):
    assert gradcheck(operation(join, relu, training, backend), leaves(device), atol=1e-7)


@pytest.mark.parametrize("join", JOINS)
def test_both_handles_of_a_fork(join, device):
    assert gradcheck(operation(join, True, True, "triton", fork=True), leaves(device), atol=1e-7, fast_mode=True)


@pytest.mark.parametrize("backend", ("triton", "aten"))
@pytest.mark.parametrize("training", (True, False), ids=("training", "frozen"))
@pytest.mark.parametrize("join", JOINS)
def test_second_derivatives(join, training, backend, device):
    assert gradgradcheck(operation(join, True, training, backend), leaves(device), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("training", (True, False), ids=("training", "frozen"))
def test_the_reference_backward_is_the_derivative_of_the_reference_forward(training):
    x, dz, weight, bias, *_ = leaves(torch.device("cpu"))
    mean, var = reference.statistics(x.detach()) if training else (torch.zeros(3).double(), torch.ones(3).double())
    y = reference.forward(x, *(() if training else (mean, var)), weight=weight, bias=bias, relu=False)
    expected = torch.autograd.grad(y, (x, weight, bias), dz)
    found = reference.backward(dz, x, mean, (var + 1e-5).rsqrt(), weight, training)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
