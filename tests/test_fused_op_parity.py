"""The fused operation computes what F.batch_norm, + and F.relu compute: outputs, gradients, running statistics."""

import itertools

import pytest
import torch
from fused_op import CORNERS, LAYOUTS, ROUNDINGS, VIEWS, Case, assert_agrees, eager, make_operands, ours, results

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

PLAIN = Case("plain", (3, 16, 6, 5))
ODD, TILES, PIXELS = CORNERS[2:5]
CHANNEL_TILES = Case("several tiles of channels", (1, 136, 3, 3))
MEAN = Case("mean 1000 standard deviations", (4, 16, 8, 8), mean=1000.0)
FORK = Case("two handles, frozen shortcut", (2, 9, 5, 7), residual_training=False, fork=True, momentum=1.0)
CONSTANT = Case("constant channels, at ReLU's kink", (3, 4, 3, 5), mean=0.7, std=0.0, affine=False)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(case, join, relu, layout, dtype, device):
    assert_agrees(make_operands(case, dtype, layout, device), join, relu)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("join", "relu", "layout", "dtype"),
    (
        ("none", True, "channels_last", torch.bfloat16),
        ("none", False, "nchw", torch.float32),
        ("add", True, "nchw", torch.float16),
        ("add", False, "channels_last", torch.bfloat16),
        ("bn", True, "channels_last", torch.float64),
        ("bn", False, "nchw", torch.bfloat16),
    ),
    ids=str,
)
def test_every_join_type_and_layout(join, relu, layout, dtype, device):
    check(PLAIN, join, relu, layout, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("case", (*CORNERS, CHANNEL_TILES, MEAN, CONSTANT, FORK), ids=str)
def test_corners_in_channels_last(case, device):
    check(case, "bn", True, "channels_last", torch.float32, device)


@pytest.mark.parametrize("case", (ODD, TILES, PIXELS, CHANNEL_TILES, FORK), ids=str)
def test_corners_in_nchw(case, device):
    check(case, "bn", True, "nchw", torch.float32, device)


@pytest.mark.parametrize("case", (ODD, PIXELS, MEAN, FORK), ids=str)
def test_corners_with_gradients_that_can_be_differentiated(case, device):
    operands = make_operands(case, torch.float32, "channels_last", device)
    assert_agrees(operands, "bn", True, ROUNDINGS, create_graph=True)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view, device):
    check(Case("view", (3, 9, 5, 4)), "bn", True, view, torch.float32, device)


@pytest.mark.parametrize("case", (*CORNERS[4:], CONSTANT, FORK), ids=str)
def test_aten_on_cpu_is_eager_to_the_bit(case):
    """Users without a GPU get the very same numbers."""
    for dtype, join, relu, layout in itertools.product(DTYPES, ("none", "add", "bn"), (True, False), LAYOUTS):
        operands = make_operands(case, dtype, layout, torch.device("cpu"))
        found, expected = results(ours, operands, join, relu, "aten"), results(eager, operands, join, relu)
        for name in found:
            assert torch.equal(found[name], expected[name]), (dtype, join, relu, layout, name)
