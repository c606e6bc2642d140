"""Bad input raises at the call, naming the rule and the value."""

import re

import pytest
import torch
from torch import nn

from resnet_fast import FusedBatchNorm2d
from resnet_fast.functional import BatchNormArgs, batch_norm_add_relu

X = torch.randn(2, 4, 3, 3)
VECTOR = torch.ones(4)
NORM = BatchNormArgs(VECTOR, VECTOR)

CASES = {
    "x not 4-D": ({"x": torch.randn(2, 4, 3)}, ValueError, "x must be 4-D [N, C, H, W], got 3-D (2, 4, 3)"),
    "integer x": (
        {"x": torch.ones(2, 4, 3, 3, dtype=torch.int64)},
        TypeError,
        "x must be fp16, bf16, fp32 or fp64, got torch.int64",
    ),
    "no tensor": ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    "weight too short": ({"weight": torch.ones(3)}, ValueError, "weight must have shape (4,), got (3,)"),
    "bias too long": ({"bias": torch.ones(5)}, ValueError, "bias must have shape (4,), got (5,)"),
    "running_mean 2-D": (
        {"running_mean": torch.ones(4, 1)},
        ValueError,
        "running_mean must have shape (4,), got (4, 1)",
    ),
    "weight in fp64": (
        {"weight": VECTOR.double()},
        TypeError,
        "vectors must all be torch.float32 for x of torch.float32",
    ),
    "weight elsewhere": ({"weight": VECTOR.to("meta")}, ValueError, "weight must be on x's device cpu, got meta"),
    "residual of another shape": (
        {"residual": X[:1]},
        ValueError,
        "residual must have x's shape (2, 4, 3, 3), got (1, 4, 3, 3)",
    ),
    "residual elsewhere": ({"residual": X.to("meta")}, ValueError, "residual must be on x's device cpu, got meta"),
    "residual_norm alone": ({"residual_norm": NORM}, ValueError, "residual_norm needs a residual, got residual=None"),
    "residual_norm's weight": (
        {"residual": X, "residual_norm": NORM._replace(weight=torch.ones(2))},
        ValueError,
        "residual_norm.weight must have shape (4,), got (2,)",
    ),
    "one running statistic": (
        {"running_var": None},
        ValueError,
        "running_mean and running_var must be given both or neither",
    ),
    "nothing to normalize with": (
        {"running_mean": None, "running_var": None},
        ValueError,
        "running_mean and running_var must be given when training is False",
    ),
    "one value per channel": (
        {"x": torch.randn(1, 4, 1, 1), "training": True},
        ValueError,
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 4, 1, 1])",
    ),
    "residual_norm in another type": (
        {"x": X.double(), "running_mean": VECTOR.double(), "running_var": VECTOR.double()}
        | {"residual": X, "residual_norm": NORM},
        TypeError,
        "residual_norm.vectors must all be torch.float64 for x of torch.float64",
    ),
    "eps": ({"eps": -1.0}, ValueError, "eps must be positive, got -1.0"),
    "momentum": ({"momentum": float("nan")}, ValueError, "momentum must be a finite number, got nan"),
    "no momentum": ({"momentum": None}, ValueError, "momentum must be a finite number, got None"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of ('triton', 'aten') or None, got 'cuda'"),
}


@pytest.mark.parametrize("case", CASES)
def test_function(case):
    changes, error, message = CASES[case]
    arguments = {"x": X, "running_mean": VECTOR.clone(), "running_var": VECTOR.clone()} | changes
    with pytest.raises(error, match=re.escape(message)):
        batch_norm_add_relu(**arguments)


@pytest.mark.parametrize("shape", ((1, 4, 1, 1), (4, 3, 3), (2, 5, 3, 3)))
def test_module_refuses_what_torchs_refuses(shape):
    x = torch.randn(shape)
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        nn.BatchNorm2d(4)(x)
    with pytest.raises((ValueError, RuntimeError)) as ours:
        FusedBatchNorm2d(4)(x)
    if shape[-1] == 1:  # torch's own rule and wording
        assert str(ours.value) == str(theirs.value)


def test_a_refused_batch_changes_nothing():
    module = FusedBatchNorm2d(4)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with pytest.raises(ValueError):
        module(torch.randn(1, 4, 1, 1))
    with pytest.raises(ValueError):
        module(torch.randn(2, 5, 3, 3))
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name
