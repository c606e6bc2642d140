"""torch.library.opcheck: schema, autograd registration, fake kernels and AOT dispatch of both operators."""

import pytest
import torch
from fused_op import Case, make_operands

from resnet_fast.ops import BatchNormArgs

OPS = torch.ops.resnet_fast
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
CASE = Case("opcheck", (2, 12, 4, 5))


def forward_arguments(join, relu, training, layout, device, dtype=torch.float32, requires_grad=False):
    operands = make_operands(CASE, dtype, layout, device)
    norm, residual_norm = (norm._replace(training=training) for norm in operands.norms)
    x = operands.x.requires_grad_(requires_grad)
    residual = None if join == "none" else operands.residual
    return (x, *norm, residual, *(residual_norm if join == "bn" else BatchNormArgs(None, None)), join, relu)


def backward_arguments(arguments, fork):
    x, _, _, weight, bias, training, _, _, residual, _, _, residual_weight, residual_bias, *rest = arguments
    residual_training, _, _, join, relu = rest
    y, relu_mask, mean, rstd, residual_mean, residual_rstd = OPS.batch_norm_add_relu(*arguments)
    bn_join = (residual, residual_mean, residual_rstd) if join == "bn" else (None, None, None)
    dy = torch.randn_like(y)
    saved = (
        x,
        relu_mask if relu_mask.numel() else None,
        mean,
        rstd,
        weight,
        bias,
        *bn_join,
        residual_weight,
        residual_bias,
    )
    return (dy, dy.clone() if fork else None, *saved, join, relu, training, residual_training)


VARIANTS = pytest.mark.parametrize(
    ("join", "relu", "training", "layout"),
    (
        ("none", True, True, "channels_last"),
        ("none", False, False, "nchw"),
        ("add", True, True, "channels_last"),
        ("add", False, True, "nchw"),
        ("bn", True, True, "channels_last"),
        ("bn", True, False, "nchw"),
    ),
)


@VARIANTS
def test_forward(join, relu, training, layout, device):
    for requires_grad in (False, True):
        arguments = forward_arguments(join, relu, training, layout, device, requires_grad=requires_grad)
        torch.library.opcheck(OPS.batch_norm_add_relu.default, arguments, test_utils=CHECKS)


@VARIANTS
def test_backward(join, relu, training, layout, device):
    for fork in (False, True):
        arguments = backward_arguments(forward_arguments(join, relu, training, layout, device), fork)
        torch.library.opcheck(OPS.batch_norm_add_relu_backward.default, arguments, test_utils=CHECKS)


def test_bfloat16(device):
    arguments = forward_arguments("bn", True, True, "channels_last", device, torch.bfloat16)
    torch.library.opcheck(OPS.batch_norm_add_relu.default, arguments, test_utils=CHECKS)
    torch.library.opcheck(
        OPS.batch_norm_add_relu_backward.default, backward_arguments(arguments, True), test_utils=CHECKS
    )
