"""The fused operation computes what F.batch_norm, + and F.relu compute: outputs, gradients, running statistics."""

import itertools

import pytest
import torch
from fused_op import CORNERS, LAYOUTS, ROUNDINGS, VIEWS, Case, assert_agrees, eager, make_operands, ours, results

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

PLAIN = Case("plain", (3, 16, 6, 5))
CASES = (
    *CORNERS,
    Case("several tiles and splits", (5, 200, 9, 11)),
    Case("mean 1000 standard deviations", (4, 16, 8, 8), mean=1000.0),
    Case("constant channels, at ReLU's kink", (3, 4, 3, 5), mean=0.7, std=0.0, affine=False),
    Case("two handles, frozen shortcut", (2, 9, 5, 7), residual_training=False, fork=True, momentum=1.0),
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(case, join, relu, layout, dtype, device):
    assert_agrees(make_operands(case, dtype, layout, device), join, relu)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("join", "relu", "layout"), list(itertools.product(("none", "add", "bn"), (True, False), LAYOUTS))
)
def test_every_join_type_and_layout(join, relu, layout, dtype, device):
    check(PLAIN, join, relu, layout, dtype, device)


@pytest.mark.parametrize("layout", (pytest.param("channels_last", marks=pytest.mark.gpu), "nchw"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_corners_on_the_kernels(case, layout, device):
    check(case, "bn", True, layout, torch.float32, device)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_corners_in_bfloat16_without_a_residual(case, layout, device):
    check(case, "none", True, layout, torch.bfloat16, device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_corners_with_gradients_that_can_be_differentiated(case, device):
    operands = make_operands(case, torch.float32, "channels_last", device)
    assert_agrees(operands, "bn", True, ROUNDINGS, create_graph=True)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view, device):
    check(Case("view", (3, 9, 5, 4)), "bn", True, view, torch.float32, device)


@pytest.mark.parametrize("case", (PLAIN, *CASES), ids=str)
def test_aten_on_cpu_is_eager_to_the_bit(case):
    """Users without a GPU get the very same numbers."""
    for dtype, join, relu, layout in itertools.product(DTYPES, ("none", "add", "bn"), (True, False), LAYOUTS):
        operands = make_operands(case, dtype, layout, torch.device("cpu"))
        found, expected = results(ours, operands, join, relu, "aten"), results(eager, operands, join, relu)
        for name in found:
            assert torch.equal(found[name], expected[name]), (dtype, join, relu, layout, name)


def test_gradients_do_not_depend_on_the_layout(device):
    channels_last = results(ours, make_operands(PLAIN, torch.float64, "channels_last", device), "bn", True, "triton")
    nchw = results(ours, make_operands(PLAIN, torch.float64, "nchw", device), "bn", True, "triton")
    for name in nchw:
        torch.testing.assert_close(channels_last[name], nchw[name], rtol=1e-12, atol=1e-12)  # fp64, sums in two orders
