"""The gradients are the derivatives: gradcheck in fp64 of the interpreted kernels, of ATen and of the reference.

Its fast mode projects each Jacobian on a random direction.
"""

import pytest
import torch
from fused_op import LAYOUTS
from torch.autograd import gradcheck, gradgradcheck

from resnet_fast.functional import BatchNormArgs, batch_norm_add_relu
from resnet_fast.ops import reference

SHAPE = (2, 3, 2, 2)


def leaves(device, layout: str = "nchw") -> list[torch.Tensor]:
    """x, residual and two pairs of weight and bias, fp64; values away from ReLU's kink."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2)]
    images = [image.contiguous(memory_format=LAYOUTS[layout]) for image in images]
    vectors = [0.5 + torch.rand(SHAPE[1], generator=generator, dtype=torch.float64) for _ in range(4)]
    return [tensor.to(device).requires_grad_() for tensor in (*images, *vectors)]


def operation(
    join: str,
    relu: bool,
    training: bool,
    backend: str,
    fork: bool = False,
    residual_training: bool | None = None,
    affine: bool = True,
):
    """`residual_training`: None for as `training`."""

    def norm(vector, weight, bias, training) -> BatchNormArgs:
        running = (None, None) if training else (torch.zeros_like(vector) + 0.1, torch.ones_like(vector) * 1.3)
        return BatchNormArgs(*running, *((weight, bias) if affine else (None, None)), training)

    def run(x, residual, weight, bias, residual_weight, residual_bias):
        of_residual = training if residual_training is None else residual_training
        return batch_norm_add_relu(
            x,
            *norm(weight.detach(), weight, bias, training),
            residual=None if join == "none" else residual,
            residual_norm=norm(weight.detach(), residual_weight, residual_bias, of_residual) if join == "bn" else None,
            relu=relu,
            fork=fork,
            backend=backend,
        )

    return run


PLAIN = {
    "none": {"join": "none"},
    "add, linear": {"join": "add", "relu": False},
    "bn": {"join": "bn"},
    "bn, frozen": {"join": "bn", "training": False},
    "bn, ATen": {"join": "bn", "backend": "aten"},
}
FROZEN_BESIDE_BATCH_NORM = {"training": False, "residual_training": True}
NOT_PLAIN = {
    "fork, add, linear": {"join": "add", "fork": True, "relu": False},
    "fork, bn": {"join": "bn", "fork": True},
    "batch statistics joined by frozen ones": {"join": "bn", "residual_training": False},
    "frozen statistics joined by the batch's, fork": {"join": "bn", "fork": True, **FROZEN_BESIDE_BATCH_NORM},
    "no affine": {"join": "bn", "affine": False},
}


def named(case: str):
    return operation(**{"relu": True, "training": True, "backend": "triton", **(PLAIN | NOT_PLAIN)[case]})


@pytest.mark.parametrize("case", ("none", "add, linear", "bn, frozen", "bn, ATen", "fork, bn"))
def test_gradients(case, device):
    assert gradcheck(named(case), leaves(device), atol=1e-7, fast_mode=True)


SECOND = ("add, linear", "bn, frozen", "batch statistics joined by frozen ones")
MORE_SECOND = ("bn", "fork, bn", "frozen statistics joined by the batch's, fork", "no affine")


@pytest.mark.parametrize("case", (*SECOND, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_SECOND)))
def test_second_derivatives(case, device):
    assert gradgradcheck(named(case), leaves(device), atol=1e-6, fast_mode=True)


def shared_residual(leaves):
    """x is its own shortcut."""
    return leaves | {"residual": leaves["x"]}


def residual_behind_x(leaves):
    return leaves | {"x": leaves["residual"].sin()}


def shared_weight(leaves):
    return leaves | {"residual_weight": leaves["weight"]}


def weight_from_x(leaves):
    return leaves | {"weight": leaves["x"].mean((0, 2, 3)).exp()}


NAMES = ("x", "residual", "weight", "bias", "residual_weight", "residual_bias")


def plain_and_differentiable(operation, tie, device, layout: str = "nchw"):
    """The gradients of all leaves, both ways. gradgradcheck compares a gradient with itself: this one with another."""
    found = []
    for create_graph in (False, True):
        tensors = leaves(device, layout)
        arguments = tie(dict(zip(NAMES, tensors, strict=True)))
        handles = operation(*(arguments[name] for name in NAMES))
        loss = 0
        for index, y in enumerate(handles if isinstance(handles, tuple) else (handles,)):
            loss = loss + (y * torch.linspace(-1 - index, 2, y.numel(), dtype=y.dtype, device=device).view_as(y)).sum()
        found.append(torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True))
    return found


def assert_same(found) -> None:
    for plain, differentiable in zip(*found, strict=True):
        torch.testing.assert_close(differentiable, plain, rtol=1e-12, atol=1e-12)  # fp64, sums in two orders


@pytest.mark.parametrize("tie", (shared_residual, residual_behind_x, shared_weight, weight_from_x))
def test_gradients_of_tied_inputs_that_can_be_differentiated_are_the_plain_ones(tie, device):
    """Inputs that hang together could be counted twice."""
    assert_same(plain_and_differentiable(operation("bn", True, True, "triton"), tie, device))


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_gradients_that_can_be_differentiated_are_the_plain_ones(case, device):
    assert_same(plain_and_differentiable(named(case), dict, device, "channels_last"))


def test_only_the_residual_wants_a_gradient(device):
    x, residual, *_ = (leaf.detach() for leaf in leaves(device))
    residual.requires_grad_()
    y = batch_norm_add_relu(x, None, None, training=True, residual=residual, backend="triton")
    (gradient,) = torch.autograd.grad(y.sum(), residual, create_graph=True)
    assert torch.equal(gradient, (y > 0).to(gradient.dtype))


@pytest.mark.parametrize("training", (True, False), ids=("training", "frozen"))
def test_the_reference_backward_is_the_derivative_of_the_reference_forward(training):
    x, dz, weight, bias, *_ = leaves(torch.device("cpu"))
    mean, var = reference.statistics(x.detach()) if training else (torch.zeros(3).double(), torch.ones(3).double())
    y = reference.forward(x, *(() if training else (mean, var)), weight=weight, bias=bias, relu=False)
    expected = torch.autograd.grad(y, (x, weight, bias), dz)
    found = reference.backward(dz, x, mean, (var + 1e-5).rsqrt(), weight, training)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", (True, False), ids=("training", "frozen"))
def test_the_kernels_compute_the_reference(training, device):
    """Both joins that have formulas of their own, forward and backward, in fp64."""
    x, residual, weight, bias, residual_weight, residual_bias = leaves(device)
    y = operation("bn", True, training, "triton")(x, residual, weight, bias, residual_weight, residual_bias)
    given = {} if training else {"mean": torch.zeros_like(weight) + 0.1, "var": torch.ones_like(weight) * 1.3}
    shortcut = reference.forward(residual, weight=residual_weight, bias=residual_bias, relu=False, **given)
    torch.testing.assert_close(y, reference.forward(x, weight=weight, bias=bias, residual=shortcut, **given))

    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=device).view_as(y)
    found = torch.autograd.grad(y, (x, weight, bias, residual, residual_weight, residual_bias), dy)
    dz, expected = dy.masked_fill(y <= 0, 0), []
    for tensor, scale in ((x, weight), (residual, residual_weight)):
        mean, var = reference.statistics(tensor) if training else (given["mean"], given["var"])
        expected += reference.backward(dz, tensor, mean, (var + 1e-5).rsqrt(), scale, training)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
