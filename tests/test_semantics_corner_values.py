"""Every momentum and eps that F.batch_norm accepts is accepted, with the same results."""

import math

import pytest
import torch
import torch.nn.functional as F

from resnet_fast.functional import batch_norm_add_relu

CASES = {
    "momentum 0": (True, {"momentum": 0.0}),
    "momentum 1": (True, {"momentum": 1.0}),
    "negative momentum": (True, {"momentum": -1.2}),
    "infinite momentum": (True, {"momentum": math.inf}),
    "momentum NaN": (True, {"momentum": math.nan}),
    "momentum NaN, evaluation": (False, {"momentum": math.nan}),
    "eps 0, evaluation": (False, {"eps": 0.0}),
    "integer eps": (True, {"eps": 1}),
    "huge eps": (True, {"eps": 1e300}),
    "infinite eps": (True, {"eps": math.inf}),
    "infinite eps, evaluation": (False, {"eps": math.inf}),
    "eps NaN": (True, {"eps": math.nan}),
}


def results(function, training, options, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    vectors = [1 + torch.rand(4, generator=generator, dtype=torch.float64).to(device) for _ in range(4)]
    running, affine = vectors[:2], [vector.requires_grad_() for vector in vectors[2:]]
    y = function(x, *running, *affine, training, **options)
    y.pow(3).sum().backward()
    return y.detach(), x.grad, [vector.grad for vector in affine], running


@pytest.mark.parametrize("case", CASES)
def test_value(case, device):
    training, options = CASES[case]
    try:
        expected = results(F.batch_norm, training, options, device)
    except ValueError as error:  # eps of 0, which older versions of torch refuse in evaluation, too
        pytest.skip(f"torch {torch.__version__}: {error}")
    for backend in ("triton", "aten"):
        found = results(batch_norm_add_relu, training, options | {"relu": False, "backend": backend}, device)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)  # fp64, sums of 18 terms
