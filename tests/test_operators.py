"""torch.library.opcheck of both operators (schema, autograd registration, fake kernels, AOT), and their layouts."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fused_op import LAYOUTS, Case, make_operands, same_layout

from resnet_fast.ops.arguments import Inputs, Outputs, Saved, Settings, arguments_of
from resnet_fast.ops.layout import dense

OPS = torch.ops.resnet_fast
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
CASE = Case("opcheck", (2, 12, 4, 5))


def forward_arguments(join, relu, training, layout, device, requires_grad=False, ghost=0):
    operands = make_operands(CASE, torch.float32, layout, device)
    norm, residual_norm = (norm._replace(training=training) for norm in operands.norms)
    x = operands.x.requires_grad_(requires_grad)
    residual = None if join == "none" else operands.residual
    inputs, settings = arguments_of(x, norm, residual, residual_norm if join == "bn" else None, relu, ghost)
    return (*inputs, *settings)


def backward_arguments(arguments, fork):
    inputs, settings = Inputs(*arguments[:12]), Settings(*arguments[12:])
    outputs = Outputs(*(one if one.numel() else None for one in OPS.batch_norm_add_relu(*arguments)))
    dy = torch.randn_like(outputs.y)
    return (dy, dy.clone() if fork else None, *Saved.of(inputs, settings, outputs), *settings)


VARIANTS = pytest.mark.parametrize(
    ("join", "relu", "training", "layout"),
    (
        ("none", False, False, "nchw"),
        ("add", True, True, "channels_last"),
        ("bn", True, True, "nchw"),
    ),
)


@VARIANTS
def test_forward(join, relu, training, layout, device):
    arguments = forward_arguments(join, relu, training, layout, device, requires_grad=True)
    torch.library.opcheck(OPS.batch_norm_add_relu.default, arguments, test_utils=CHECKS)


@VARIANTS
def test_backward(join, relu, training, layout, device):
    arguments = backward_arguments(forward_arguments(join, relu, training, layout, device), fork=join != "none")
    torch.library.opcheck(OPS.batch_norm_add_relu_backward.default, arguments, test_utils=CHECKS)


@pytest.mark.slow
def test_ghost_batches(device):
    for join, layout, ghost in (("none", "nchw", 1), ("bn", "channels_last", 2)):  # of one image, and of all
        arguments = forward_arguments(join, True, True, layout, device, ghost=ghost)
        torch.library.opcheck(OPS.batch_norm_add_relu.default, arguments, test_utils=CHECKS)
        torch.library.opcheck(
            OPS.batch_norm_add_relu_backward.default, backward_arguments(arguments, True), test_utils=CHECKS
        )


def inputs(shape: tuple[int, ...]):
    """Tensors of this shape, of every order of axes, expanded along every set of axes, and with gaps."""
    for order in itertools.permutations(range(4)):
        back = [order.index(axis) for axis in range(4)]
        yield torch.ones(shape).permute(order).contiguous().permute(back)
        yield torch.ones([2 * n for n in shape]).permute(order).contiguous().permute(back)[::2, ::2, ::2, ::2]
    for axes in itertools.product((False, True), repeat=4):
        base = torch.ones([n if keep else 1 for n, keep in zip(shape, axes, strict=True)])
        for memory_format in LAYOUTS.values():
            yield base.contiguous(memory_format=memory_format).expand(shape)


def test_a_dense_copy_is_laid_out_as_eagers_result():
    """Found with two channels expanded from one, in images one pixel wide."""
    for shape in itertools.product((1, 2), (1, 2), (1, 3), (1, 2)):
        for x in inputs(shape):
            eager = F.batch_norm(x, torch.zeros(shape[1]), torch.ones(shape[1]))
            assert same_layout(dense(x), eager), (shape, x.stride())
