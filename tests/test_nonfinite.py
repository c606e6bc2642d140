"""NaN and infinity in the inputs reach the same outputs as in eager PyTorch on a CPU, and no others.

Every channel holds one kind of poison at one place and every third channel none: channels do not mix. The reference is
eager on the CPU on every device, since its CUDA kernels differ from it (Welford makes the mean of infinities NaN).
"""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from budget import assert_within_budget
from fused_op import Case, Operands, eager, magnitudes, make_operands, ours, results
from torch import Tensor
from traffic import pivot_rows

from resnet_fast.ops import reference

# Several tiles and splits in either layout, the last ones not full.
SHAPE = (2, 24, 9, 9)
NAN, INF = float("nan"), float("inf")
KINDS = ((NAN,), (INF,), (-INF,), (INF, -INF))
# Image and pixel of one value or of two: in rows of which the pivot is made, and elsewhere.
PIVOT_ROWS = [(row // 81, row % 81) for row in pivot_rows(2 * 81, 64).tolist()]
PLACES = (((0, 0), PIVOT_ROWS[1]), (PIVOT_ROWS[2], (0, 60)), ((1, 80), (0, 60)), ((0, 63), (0, 0)))
CLEAN = slice(2, None, 3)
CPU = torch.device("cpu")


def poisoned(operands: Operands, target: str) -> Operands:
    """`target` (x, residual or dy) with every kind at every place, each in a channel of its own."""
    tensor = getattr(operands, target).clone()
    channels = (channel for channel in range(SHAPE[1]) if channel % 3 != 2)
    for (place, values), channel in zip(product(PLACES, KINDS), channels, strict=True):
        for value, (image, pixel) in zip(values, place, strict=False):
            tensor.flatten(2)[image, channel, pixel] = value
    return replace(operands, **{target: tensor})


def poisoned_vector(operands: Operands, norm: int, name: str, kinds: tuple[float, ...]) -> Operands:
    """One per-channel vector of norm 0 (of x) or 1 (of the residual) with `kinds`, one by one, then a clean channel."""
    vector = getattr(operands.norms[norm], name).clone()
    for place, kind in enumerate(kinds):
        vector[place :: len(kinds) + 1] = kind
    norms = list(operands.norms)
    norms[norm] = norms[norm]._replace(**{name: vector})
    return replace(operands, norms=norms)


def assert_same_pattern(name: str, found: Tensor, expected: Tensor) -> None:
    for predicate in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = predicate(found) != predicate(expected)
        where = wrong.nonzero()[:3].tolist()
        assert not wrong.any(), (
            f"{name}: {predicate.__name__} differs at {where}, {found[wrong][:3]} {expected[wrong][:3]}"
        )


@cache
def clean_results(training: bool, join: str, relu: bool, layout: str, dtype: torch.dtype, device: torch.device):
    """Of ours, and the magnitudes of the terms."""
    operands = make_operands(Case("non-finite", SHAPE, training=training), dtype, layout, device)
    return results(ours, operands, join, relu, "triton"), magnitudes(operands, join)


def on(device: torch.device, operands: Operands) -> Operands:
    norms = [
        norm._replace(**{name: v.to(device) for name, v in norm._asdict().items() if isinstance(v, Tensor)})
        for norm in operands.norms
    ]
    x, residual, dy = (tensor.to(device) for tensor in (operands.x, operands.residual, operands.dy))
    return replace(operands, x=x, residual=residual, dy=dy, norms=norms)


def check(operands: Operands, join: str, relu: bool, device: torch.device, added: dict[str, Tensor]):
    """Ours as eager on the CPU: NaN and infinities in place, and what is finite within the budget."""
    found = results(ours, on(device, operands), join, relu, "triton")
    expected = results(eager, operands, join, relu)
    exact = results(eager, operands.to(torch.float64), join, relu)
    assert found.keys() == expected.keys()
    for name in found:
        result = found[name].cpu()
        assert_same_pattern(name, result, expected[name])
        finite = expected[name].isfinite()
        terms = added[name].cpu()[finite] if name in added else None
        if finite.any():
            assert_within_budget(name, result[finite], expected[name][finite], exact[name][finite], terms)
    return found


ONE_ELEMENT = (  # target, join, ReLU, layout, type, batch statistics
    ("x", "none", False, "nchw", torch.float32, True),
    ("x", "bn", True, "channels_last", torch.bfloat16, True),
    ("x", "none", True, "channels_last", torch.bfloat16, False),
    ("residual", "add", True, "nchw", torch.float32, True),
    ("residual", "bn", True, "channels_last", torch.bfloat16, True),
    ("dy", "none", True, "nchw", torch.float32, True),
    ("dy", "bn", True, "channels_last", torch.bfloat16, True),
)
MORE = [
    (target, join, relu, "channels_last", torch.float16, training)
    for target, (join, relu), training in product(("x", "dy"), (("add", True), ("bn", True)), (True, False))
]


@pytest.mark.parametrize(
    ("target", "join", "relu", "layout", "dtype", "training"),
    (*ONE_ELEMENT, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)),
    ids=str,
)
def test_one_element(target, join, relu, layout, dtype, training, device):
    case = Case("non-finite", SHAPE, training=training)
    operands = poisoned(make_operands(case, dtype, layout, CPU), target)
    clean, added = clean_results(training, join, relu, layout, dtype, device)
    found = check(operands, join, relu, device, added)
    for name, result in found.items():
        channels = (..., CLEAN) if result.dim() == 1 else (slice(None), CLEAN)
        assert torch.equal(result[channels], clean[name][channels]), f"{name}: another channel's poison shows"


@pytest.mark.parametrize(
    ("name", "join", "norm", "training"),
    (
        ("weight", "bn", 0, True),
        ("bias", "bn", 1, True),
        ("running_mean", "none", 0, True),
        ("running_var", "none", 0, False),
        pytest.param("running_mean", "bn", 1, False, marks=pytest.mark.slow),
        pytest.param("running_var", "bn", 1, True, marks=pytest.mark.slow),
    ),
)
def test_one_channel_of_a_vector(name, join, norm, training, device):
    """Infinite weights are not among them: see `test_infinite_weight`."""
    kinds = (NAN,) if name == "weight" else (NAN, INF, -INF)
    case, relu = Case("non-finite", SHAPE, training=training), join == "bn"
    operands = poisoned_vector(make_operands(case, torch.float32, "channels_last", CPU), norm, name, kinds)
    _, added = clean_results(training, join, relu, "channels_last", torch.float32, device)
    check(operands, join, relu, device, added)


@pytest.mark.parametrize(("relu", "training"), ((True, True), (False, False)))
def test_infinite_weight(relu, training, device):
    """As (x - mean) · rstd · weight + bias says, and as CUDA's eager does it.

    On the CPU eager computes x·alpha + (bias - mean·alpha), which is NaN wherever x and mean have the same sign.
    """
    case = Case("non-finite", SHAPE, training=training)
    operands = poisoned_vector(make_operands(case, torch.float32, "channels_last", CPU), 0, "weight", (INF, -INF))
    found = results(ours, on(device, operands), "none", relu, "triton")
    exact = operands.to(torch.float64)
    x, norm = exact.x, exact.norms[0]
    mean, var = reference.statistics(x) if training else (norm.running_mean, norm.running_var)
    rstd = (var + norm.eps).rsqrt()
    y = reference.normalize(x, mean, rstd, norm.weight, norm.bias)
    dz = exact.dy.masked_fill(y <= 0, 0) if relu else exact.dy
    gradients = reference.backward(dz, x, mean, rstd, norm.weight, training)
    expected = dict(zip(("dx", "dweight", "dbias"), gradients, strict=True)) | {"y": y.relu() if relu else y}
    for name, result in expected.items():
        assert_same_pattern(name, found[name].cpu(), result)
