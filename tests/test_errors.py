"""Bad input raises at the call, naming the rule and the value; the exception is torch's if torch raises one."""

import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fast import FusedBatchNorm2d
from resnet_fast.functional import BatchNormArgs, batch_norm_add_relu

X = torch.randn(2, 4, 3, 3)
VECTOR = torch.ones(4)
NORM = BatchNormArgs(VECTOR, VECTOR)

CASES = {
    "x 1-D": ({"x": torch.randn(4)}, RuntimeError, "x must be [N, C, ...], got 1-D (4,)"),
    "integer x": (
        {"x": torch.ones(2, 4, 3, 3, dtype=torch.int64)},
        NotImplementedError,
        "x must be fp16, bf16, fp32 or fp64, got torch.int64",
    ),
    "no tensor": ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    "weight no tensor": ({"weight": [1.0] * 4}, TypeError, "weight must be a Tensor, got list"),
    "weight too short": ({"weight": torch.ones(3)}, RuntimeError, "weight must have shape (4,), got (3,)"),
    "bias too long": ({"bias": torch.ones(5)}, RuntimeError, "bias must have shape (4,), got (5,)"),
    "running_mean 2-D": (
        {"running_mean": torch.ones(4, 1)},
        RuntimeError,
        "running_mean must have shape (4,), got (4, 1)",
    ),
    "weight in fp64": (
        {"weight": VECTOR.double()},
        RuntimeError,
        "vectors must all be torch.float32 for x of torch.float32",
    ),
    "weight elsewhere": ({"weight": VECTOR.to("meta")}, RuntimeError, "weight must be on x's device cpu, got meta"),
    "residual of another shape": (
        {"residual": X[:1]},
        ValueError,
        "residual must have x's shape (2, 4, 3, 3), got (1, 4, 3, 3)",
    ),
    "residual elsewhere": ({"residual": X.to("meta")}, ValueError, "residual must be on x's device cpu, got meta"),
    "residual_norm alone": ({"residual_norm": NORM}, ValueError, "residual_norm needs a residual, got residual=None"),
    "residual_norm no BatchNormArgs": (
        {"residual": X, "residual_norm": (VECTOR, VECTOR)},
        TypeError,
        "residual_norm must be a BatchNormArgs, got tuple",
    ),
    "residual_norm's weight": (
        {"residual": X, "residual_norm": NORM._replace(weight=torch.ones(2))},
        RuntimeError,
        "residual_norm.weight must have shape (4,), got (2,)",
    ),
    "one running statistic to update": (
        {"running_var": None, "training": True},
        ValueError,
        "running_mean and running_var must be given both or neither",
    ),
    "one running statistic to normalize with": (
        {"running_var": None},
        RuntimeError,
        "running_mean and running_var must be given when training is False",
    ),
    "nothing to normalize with": (
        {"running_mean": None, "running_var": None},
        RuntimeError,
        "running_mean and running_var must be given when training is False",
    ),
    "one value per channel": (
        {"x": torch.randn(1, 4, 1, 1), "training": True},
        ValueError,
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 4, 1, 1])",
    ),
    "one value per channel of the residual": (
        {"x": X[:1, :, :1, :1], "residual": X[:1, :, :1, :1], "residual_norm": NORM._replace(training=True)},
        ValueError,
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 4, 1, 1])",
    ),
    "residual_norm in another type": (
        {"x": X.double(), "running_mean": VECTOR.double(), "running_var": VECTOR.double()}
        | {"residual": X, "residual_norm": NORM},
        RuntimeError,
        "residual_norm.vectors must all be torch.float64 for x of torch.float64",
    ),
    "running_mean to learn": (
        {"running_mean": VECTOR.clone().requires_grad_()},
        RuntimeError,
        "running_mean must not require a gradient, got requires_grad=True",
    ),
    "negative eps": ({"eps": -1.0}, ValueError, "eps must be non-negative, got -1.0"),
    "eps of 0 when training": ({"eps": 0.0, "training": True}, ValueError, "eps must be positive when training"),
    "no momentum": ({"momentum": None}, TypeError, "momentum must be a number, got None"),
    "momentum a text": ({"momentum": "0.1"}, TypeError, "momentum must be a number, got '0.1'"),
    "no eps": ({"eps": None}, TypeError, "eps must be a number, got None"),
    "eps a text": ({"eps": "1e-5"}, TypeError, "eps must be a number, got '1e-5'"),
    "integer residual": (
        {"residual": torch.ones(2, 4, 3, 3, dtype=torch.int64)},
        TypeError,
        "residual must be fp16, bf16, fp32 or fp64, got torch.int64",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of ('triton', 'aten') or None, got 'cuda'"),
}


OF_OURS_ALONE = {"residual", "residual_norm", "backend"}


@pytest.mark.parametrize("case", CASES)
def test_the_function_raises_as_torch_does(case):
    changes, error, message = CASES[case]
    arguments = {"x": X, "running_mean": VECTOR.clone(), "running_var": VECTOR.clone()} | changes
    with pytest.raises(error, match=re.escape(message)):
        batch_norm_add_relu(**arguments)
    if not OF_OURS_ALONE & changes.keys():
        with pytest.raises(error) as theirs:
            F.batch_norm(**renamed({"x": X, "running_mean": VECTOR.clone(), "running_var": VECTOR.clone()} | changes))
        assert type(theirs.value) is error


def arguments(names: tuple[str, ...]) -> dict[str, Any]:
    own = {"x": X, "running_mean": VECTOR.clone(), "running_var": VECTOR.clone()}
    for name in names:
        own |= FAULTS[name]
    return own


FAULTS: dict[str, dict[str, Any]] = {
    "training": {"training": True},
    "negative eps": {"eps": -1.0},
    "no eps": {"eps": None},
    "no momentum": {"momentum": None},
    "one value per channel": {"x": torch.randn(1, 4, 1, 1)},
    "x 1-D": {"x": torch.randn(4)},
    "integer x": {"x": torch.ones(2, 4, 3, 3, dtype=torch.int64)},
    "weight no tensor": {"weight": [1.0] * 4},
    "weight too short": {"weight": torch.ones(3)},
    "weight in fp64": {"weight": VECTOR.double()},
    "one running statistic": {"running_mean": None},
    "running_mean too long": {"running_mean": torch.ones(5)},
    "running_mean to learn": {"running_mean": VECTOR.clone().requires_grad_()},
}


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
def test_of_two_faults_torchs_is_named(training):
    """The eps before types, types before shapes, and so on: whichever F.batch_norm finds first."""
    n_pairs = 0
    for pair in itertools.combinations([name for name in FAULTS if name != "training"], 2):
        if FAULTS[pair[0]].keys() & FAULTS[pair[1]].keys():
            continue
        given = arguments(("training", *pair) if training else pair)
        try:
            F.batch_norm(**renamed(given))
        except Exception as error:
            n_pairs += 1
            with pytest.raises(Exception) as ours:  # noqa: B017
                batch_norm_add_relu(**given)
            assert type(ours.value) is type(error), (pair, ours.value, error)
    assert n_pairs > 55


def renamed(changes: dict) -> dict:
    """F.batch_norm calls x `input`."""
    return {"input" if name == "x" else name: value for name, value in changes.items()}


@pytest.mark.parametrize("shape", ((1, 4, 1, 1), (4, 3, 3), (2, 4), (2, 4, 3, 3, 3), (2, 5, 3, 3)))
def test_module_refuses_what_torchs_refuses(shape):
    x = torch.randn(shape)
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        nn.BatchNorm2d(4)(x)
    with pytest.raises(type(theirs.value)) as ours:
        FusedBatchNorm2d(4)(x)
    if shape[1] == 4:  # torch's own rule and wording
        assert str(ours.value) == str(theirs.value)


def test_a_refused_batch_changes_nothing(device):
    module = FusedBatchNorm2d(4).to(device)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with pytest.raises(ValueError):
        module(torch.randn(1, 4, 1, 1, device=device))
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 5, 3, 3, device=device))
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name
