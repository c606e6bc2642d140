"""For any shape, layout, type, join, mode and values, ours is eager PyTorch within the error budget.

20 examples, the same ones every time; `--hypothesis-profile=long` looks at 20,000 others. A counter-example becomes
one of the cases of test_fused_op_parity.py.
"""

import math

import hypothesis.strategies as st
import pytest
import torch
from budget import ROUNDINGS
from fused_op import LAYOUTS, VIEWS, Case, Operands, assert_agrees, make_operands, ours, results
from hypothesis import HealthCheck, given, settings

from resnet_fast.ops.layout import layout as layout_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MAX_ELEMENTS = 1024  # one tile, or several where channels or images are cut

# Neighbours of the powers of two, at which tiles, 16-byte accesses and the bytes of ReLU's bits change.
N_CHANNELS = st.one_of(st.integers(1, 70), st.sampled_from((1, 7, 8, 9, 16, 24, 33, 64)))
SHAPES = st.tuples(st.integers(1, 5), N_CHANNELS, st.integers(1, 12), st.integers(1, 12)).filter(
    lambda shape: math.prod(shape) <= MAX_ELEMENTS
)
LAYOUT = st.sampled_from((*LAYOUTS, *VIEWS))


@st.composite
def cases(draw) -> Case:
    shape = draw(SHAPES)
    one_value = math.prod(shape) == shape[1]  # has no batch statistics
    training, residual_training = (draw(st.booleans()) and not one_value for _ in range(2))
    std = draw(st.sampled_from((1.0, 0.0, 1e-3, 30.0)))
    return Case(
        "example",
        shape,
        training,
        mean=draw(st.sampled_from((0.0, 0.5, -10.0, 1000.0))) * (std or 1.0),
        std=std,
        affine=draw(st.booleans()),
        running=draw(st.booleans()) or not (training and residual_training),
        residual_training=residual_training,
        momentum=draw(st.sampled_from((0.1, 0.0, 1.0, 0.37))),
        eps=draw(st.sampled_from((1e-5, 1e-3, 1.0))),
        fork=draw(st.booleans()),
        dy_std=draw(st.sampled_from((1.0, 0.0, 1e-3))),
        vectors_as_x=draw(st.booleans()),
        residual_layout=draw(LAYOUT),
        dy_layout=draw(LAYOUT),
        seed=draw(st.integers(0, 2**16)),
    )


DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))
JOINS = st.sampled_from(("none", "add", "bn"))


def any_input(share_of_examples: int = 1):
    """Decorates a test of (device, case, layout, dtype, join, relu)."""

    def decorate(test):
        profile = settings(
            max_examples=max(1, settings().max_examples // share_of_examples),
            suppress_health_check=[HealthCheck.function_scoped_fixture],  # memory is poisoned for all examples alike
        )
        return profile(given(case=cases(), layout=LAYOUT, dtype=DTYPES, join=JOINS, relu=st.booleans())(test))

    return decorate


@pytest.mark.gpu
@any_input()
def test_ours_is_eager(device, case, layout, dtype, join, relu):
    assert_agrees(make_operands(case, dtype, layout, device), join, relu, ROUNDINGS)


@any_input(share_of_examples=10)
def test_gradients_that_can_be_differentiated_are_eagers(device, case, layout, dtype, join, relu):
    assert_agrees(make_operands(case, dtype, layout, device), join, relu, ROUNDINGS, create_graph=True)


@any_input(share_of_examples=20)
def test_channels_do_not_mix(device, case, layout, dtype, join, relu):
    """In another order they give the very same bits, in that order."""
    operands = make_operands(case, dtype, layout, device)
    order = torch.arange(case.shape[1], device=device).roll(case.seed)

    def reorder(tensor):
        if not isinstance(tensor, torch.Tensor):  # an option of the batch norm, or what it does not have
            return tensor
        if tensor.dim() == 1:
            return tensor[order]
        return tensor[:, order].contiguous(memory_format=layout_of(operands.x))  # sums go in the order of the layout

    images = (reorder(image) for image in (operands.x, operands.residual))
    norms = [norm._make(map(reorder, norm)) for norm in operands.norms]
    reordered = Operands(*images, norms, *map(reorder, (operands.dy, operands.dy_alias)))
    found, expected = (results(ours, given, join, relu, "triton") for given in (reordered, operands))
    for name in expected:
        assert torch.equal(found[name], reorder(expected[name])), name
