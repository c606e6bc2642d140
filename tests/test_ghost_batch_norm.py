"""Ghost batches: every `ghost_batch_size` images, one group after the other, are what batch norm calls a batch.

Hoffer et al. 2017, arXiv:1705.08741. The specification is a loop over x.split(ghost_batch_size).
"""

import functools
import itertools
import pickle
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from fused_op import LAYOUTS, Case, Operands, assert_agrees, eager, make_operands, ours, results
from torch import nn

from resnet_fast import FusedBatchNorm2d, batch_norm_add_relu, functional, resnet18
from resnet_fast.kernels import tiles
from resnet_fast.nn import FusedSyncBatchNorm2d, convert_sync_batchnorm

JOINS = ("none", "add", "bn")
PLAIN = Case("groups of two images", (6, 16, 4, 6), ghost=2)
SMALLER = Case("the last group smaller, rows no multiple of eight", (7, 13, 3, 5), ghost=3)
FORK = Case("two handles, one image per group", (3, 24, 3, 3), ghost=1, fork=True)
PIXELS = Case("one pixel per image", (11, 16, 1, 1), ghost=3)
TILES = Case("several tiles and splits per group", (3, 24, 7, 7), ghost=2)
BARE = Case("no affine, no running statistics", (5, 8, 3, 3), ghost=2, affine=False, running=False)
FROZEN = Case("frozen shortcut", (5, 12, 3, 3), ghost=2, residual_training=False, momentum=1.0)
CASES = (SMALLER, FORK, PIXELS, TILES, BARE, FROZEN)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def in_groups(operation, ghost: int | None, fork: bool = False):
    return functools.partial(operation, ghost=ghost, **({"fork": True} if fork else {}))


@pytest.mark.parametrize(
    ("join", "relu", "layout"),
    (("none", False, "nchw"), ("none", True, "channels_last"), ("add", True, "nchw"), ("bn", False, "channels_last")),
)
def test_every_join_and_layout(join, relu, layout, device):
    assert_agrees(make_operands(PLAIN, torch.bfloat16, layout, device), join, relu)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_corners_in_channels_last(case, device):
    assert_agrees(make_operands(case, torch.float32, "channels_last", device), "bn", True)


@pytest.mark.parametrize("case", (SMALLER, TILES), ids=str)
def test_corners_in_nchw(case, device):
    assert_agrees(make_operands(case, torch.float32, "nchw", device), "bn", True)


def far_apart(operands: Operands, ghost: int) -> Operands:
    """Means and standard deviations of the groups differ by orders of magnitude."""
    operands.x = operands.x.clone()
    for index, group in enumerate(operands.x.split(ghost)):
        group.mul_(10.0**index).add_(1000.0 * index * (-1) ** index)
    return operands


@pytest.mark.parametrize(("join", "layout"), (("bn", "channels_last"), ("add", "nchw")))
def test_groups_far_apart(join, layout, device):
    """A pivot, or a mean, of another group's would cost all digits."""
    case = Case("far apart", (7, 12, 4, 5), ghost=2)
    assert_agrees(far_apart(make_operands(case, torch.float32, layout, device), 2), join, True)


def test_a_group_with_infinity_leaves_the_others_alone(device):
    """And values whose squares overflow are rescued in their group alone."""
    operands = make_operands(Case("one bad group", (6, 8, 3, 3), ghost=2, running=False), torch.float32, "nchw", device)
    expected = results(in_groups(ours, 2), operands, "none", False, "triton")["y"]
    operands.x = operands.x.clone()
    operands.x[2, 3, 1, 1] = float("inf")
    operands.x[4:] *= 1e30
    found = results(in_groups(ours, 2), operands, "none", False, "triton")["y"]
    assert torch.equal(found[:2], expected[:2])
    assert found[2:4, 3].isnan().any() and found[2:4, :3].isfinite().all()
    torch.testing.assert_close(found[4:], expected[4:], rtol=1e-3, atol=1e-3)  # eps counts for nothing there


@pytest.mark.parametrize("case", (SMALLER, FORK, BARE, FROZEN), ids=str)
def test_aten_on_cpu_is_a_loop_of_eager_to_the_bit(case):
    for join, relu, layout in itertools.product(JOINS, (True, False), LAYOUTS):
        operands = make_operands(case, torch.float32, layout, torch.device("cpu"))
        found = results(in_groups(ours, case.ghost), operands, join, relu, "aten")
        expected = results(in_groups(eager, case.ghost), operands, join, relu)
        assert found["y"].is_contiguous(memory_format=LAYOUTS[layout])
        for name in found:
            assert torch.equal(found[name], expected[name]), (join, relu, layout, name)


@pytest.mark.parametrize("backend", ("triton", "aten"))
@pytest.mark.parametrize("ghost", (5, 100))
def test_as_many_images_as_the_batch_has_are_plain_batch_norm_to_the_bit(ghost, backend, device):
    for join, layout in (("none", "nchw"), ("bn", "channels_last")):
        operands = make_operands(Case("plain", (5, 12, 3, 5)), torch.float32, layout, device)
        found = results(in_groups(ours, ghost), operands, join, True, backend)
        for name, expected in results(ours, operands, join, True, backend).items():
            assert torch.equal(found[name], expected), (join, layout, name)


@pytest.mark.parametrize("backend", ("triton", "aten"))
def test_frozen_statistics_know_no_groups(backend, device):
    operands = make_operands(Case("frozen", (5, 12, 3, 5), training=False), torch.float32, "channels_last", device)
    found = results(in_groups(ours, 2), operands, "bn", True, backend)
    for name, expected in results(ours, operands, "bn", True, backend).items():
        assert torch.equal(found[name], expected), name


def test_two_runs_give_the_same_bits(device):
    operands = make_operands(replace(SMALLER, fork=True), torch.bfloat16, "channels_last", device)
    first, second = (results(in_groups(ours, 3, fork=True), operands, "bn", True, "triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("join", ("none", "bn"))
def test_second_derivatives(join, device):
    """Of a penalty on the gradients, against a loop of eager."""
    operands, found = make_operands(replace(SMALLER, running=False), torch.float64, "nchw", device), []
    for operation in (functools.partial(ours, backend="triton"), eager):
        copied = operands.fresh()
        norms = [norm._replace(weight=norm.weight.requires_grad_()) for norm in copied.norms]
        leaves = [copied.x.requires_grad_(), copied.residual.requires_grad_(), *(norm.weight for norm in norms)]
        y = operation(copied.x, copied.residual, norms, join, True, ghost=3)
        first = torch.autograd.grad((y * operands.dy).sum(), leaves, create_graph=True, allow_unused=True)
        penalty = sum(gradient.square().sum() for gradient in first if gradient is not None)
        found.append(torch.autograd.grad(penalty, leaves, allow_unused=True))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)  # fp64, sums in two orders, twice


@pytest.mark.parametrize("case", (SMALLER, FORK, FROZEN), ids=str)
def test_gradients_that_can_be_differentiated_are_the_plain_ones(case, device):
    operands = make_operands(case, torch.float64, "channels_last", device)
    operation = in_groups(ours, case.ghost, case.fork)
    found = results(operation, operands, "bn", True, "triton", create_graph=True)
    for name, plain in results(operation, operands, "bn", True, "triton").items():
        torch.testing.assert_close(found[name], plain, rtol=1e-12, atol=1e-12)  # fp64, sums in two orders


class Grouped(nn.BatchNorm2d):
    """nn.BatchNorm2d, called once per group."""

    def forward(self, x, ghost=2):
        return (
            torch.cat([super(Grouped, self).forward(group) for group in x.split(ghost)])
            if self.training
            else (super().forward(x))
        )


OPTIONS = ({"momentum": 0.37, "eps": 1e-3}, {"affine": False, "track_running_stats": False})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_module(options, either_backend, device):
    """Three batches of training, the second with a smaller last group, then evaluation; numbers as in test_module."""
    module, theirs = FusedBatchNorm2d(12, ghost_batch_size=2, **options).to(device), Grouped(12, **options).to(device)
    assert list(module.state_dict()) == list(theirs.state_dict())
    torch.manual_seed(0)
    for n_images in (4, 5, 2):
        x = 2 + 3 * torch.randn(n_images, 12, 5, 4, device=device)
        torch.testing.assert_close(module(x), theirs(x), rtol=1e-4, atol=1e-5)
    for (name, found), expected in zip(module.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
    if module.track_running_stats:
        assert module.num_batches_tracked == 2 + 3 + 1
        torch.testing.assert_close(module.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_joined_modules_count_their_groups(either_backend, device):
    norms = [FusedBatchNorm2d(4, ghost_batch_size=2).to(device) for _ in range(2)]
    theirs = [nn.BatchNorm2d(4).to(device) for _ in range(2)]
    x, residual = (torch.randn(5, 4, 3, 3, device=device) for _ in range(2))
    found = norms[0].fused(x, residual, norms[1], relu=True)
    groups = zip(x.split(2), residual.split(2), strict=True)
    expected = torch.cat([torch.relu(theirs[0](a) + theirs[1](b)) for a, b in groups])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours_, theirs_ in zip(norms, theirs, strict=True):
        assert ours_.num_batches_tracked == theirs_.num_batches_tracked == 3
        torch.testing.assert_close(ours_.running_mean, theirs_.running_mean)
        torch.testing.assert_close(ours_.running_var, theirs_.running_var)


def test_one_of_two_joined_norms_is_frozen(either_backend, device):
    """Then the other's groups count alone."""
    norms = [FusedBatchNorm2d(4, ghost_batch_size=2).to(device), FusedBatchNorm2d(4).to(device).eval()]
    x, residual = (torch.randn(5, 4, 3, 3, device=device) for _ in range(2))
    expected = torch.cat([nn.BatchNorm2d(4).to(device)(group) for group in x.split(2)]) + norms[1](residual)
    torch.testing.assert_close(norms[0].fused(x, residual, norms[1], relu=False), expected, rtol=1e-5, atol=1e-5)
    assert norms[1].num_batches_tracked == 0


VALUES = {
    "zero": (0, ValueError, "ghost_batch_size must be at least 1, got 0"),
    "float": (2.0, TypeError, "ghost_batch_size must be an int or None, got 2.0"),
}


@pytest.mark.parametrize("case", VALUES)
def test_wrong_values(case):
    value, error, message = VALUES[case]
    with pytest.raises(error, match=re.escape(message)):
        FusedBatchNorm2d(4, ghost_batch_size=value)
    with pytest.raises(error, match=re.escape(message)):
        batch_norm_add_relu(torch.randn(4, 4, 2, 2), None, None, training=True, ghost_batch_size=value)
    module = FusedBatchNorm2d(4)
    module.ghost_batch_size = value
    with pytest.raises(error, match=re.escape(message)):
        module(torch.randn(4, 4, 2, 2))


def assert_refuses(module: nn.Module, error: type, message: str, *arguments, **options) -> None:
    """And changes nothing."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with pytest.raises(error, match=re.escape(message)):
        module(*arguments, **options)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize(("n_images", "ghost"), ((5, 2), (4, 1)), ids=("last group", "every group"))
def test_a_group_of_one_value_per_channel_is_refused(n_images, ghost):
    module = FusedBatchNorm2d(4, ghost_batch_size=ghost)
    message = "Expected more than 1 value per channel when training, got input size torch.Size([1, 4, 1, 1])"
    assert_refuses(module, ValueError, message, torch.randn(n_images, 4, 1, 1))
    module.eval()(torch.randn(n_images, 4, 1, 1))


def test_a_cumulative_average_is_refused():
    module = FusedBatchNorm2d(4, momentum=None, ghost_batch_size=2)
    assert_refuses(module, ValueError, "got momentum=None and ghost_batch_size=2", torch.randn(4, 4, 2, 2))
    module.eval()(torch.randn(4, 4, 2, 2))
    FusedBatchNorm2d(4, momentum=None, track_running_stats=False, ghost_batch_size=2)(torch.randn(4, 4, 2, 2))


def test_joined_norms_of_different_groups_are_refused():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.of_residual = FusedBatchNorm2d(4, ghost_batch_size=2), FusedBatchNorm2d(4)

        def forward(self, x):
            return self.norm.fused(x, x, self.of_residual, relu=True)

    message = "norms that are joined must have the same ghost_batch_size, got 2 and None"
    assert_refuses(Joined(), ValueError, message, torch.randn(4, 4, 2, 2))


def test_synchronized_statistics_are_refused(monkeypatch):
    module = FusedSyncBatchNorm2d(4, ghost_batch_size=2)
    module(torch.randn(4, 4, 2, 2))  # of one process it is FusedBatchNorm2d
    monkeypatch.setattr(FusedSyncBatchNorm2d, "group", lambda self: object())
    message = "ghost_batch_size must be None if several processes share batch statistics, got "
    assert_refuses(module, ValueError, message, torch.randn(4, 4, 2, 2))


def test_conversion_to_synchronized_norms_is_refused():
    model = nn.Sequential(FusedBatchNorm2d(4), FusedBatchNorm2d(4, ghost_batch_size=2))
    with pytest.raises(ValueError, match="1 must have no ghost_batch_size, which synchronization would undo, got 2"):
        convert_sync_batchnorm(model)
    assert [type(module) for module in model] == [FusedBatchNorm2d] * 2


def test_repr_and_copies():
    module = FusedBatchNorm2d(4, relu=True, ghost_batch_size=2)
    assert repr(module).endswith(", relu=True, ghost_batch_size=2)")
    assert "ghost" not in repr(FusedBatchNorm2d(4))
    assert pickle.loads(pickle.dumps(module)).ghost_batch_size == 2


def test_a_module_from_before_there_were_ghost_batches():
    """Unpickled, or of another class at first."""
    module = FusedBatchNorm2d(4)
    del module.__dict__["ghost_batch_size"]
    of_torch = nn.BatchNorm2d(4)
    of_torch.__class__, of_torch.relu = FusedBatchNorm2d, False
    x = torch.randn(3, 4, 2, 2)
    for old in (module, of_torch, convert_sync_batchnorm(nn.BatchNorm2d(4))):
        assert torch.equal(old(x), FusedBatchNorm2d(4)(x))
        assert repr(old).endswith("track_running_stats=True)")


@pytest.mark.slow
def test_compiled(device):
    """torch.compile without a graph break, of two batches with different numbers of images."""
    torch._dynamo.reset()
    eagerly, compiled = (FusedBatchNorm2d(8, relu=True, ghost_batch_size=2).to(device) for _ in range(2))
    function = torch.compile(lambda x, residual: compiled(x, residual), fullgraph=True, backend="aot_eager")
    for n_images in (5, 7):
        x, residual = (torch.randn(n_images, 8, 3, 3, device=device) for _ in range(2))
        found, expected = (f(x, residual) for f in (function, eagerly))
        assert torch.equal(found, expected)
    for found, expected in zip(compiled.buffers(), eagerly.buffers(), strict=True):
        assert torch.equal(found, expected)


def test_exported(device):
    module = FusedBatchNorm2d(4, ghost_batch_size=2).to(device)
    x = torch.randn(5, 4, 3, 3, device=device)
    program = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(program(x), module(x))


def test_a_network_stays_on_the_fused_path(on_aten, device):
    """Every batch norm is an operation of groups, and the training step that of torchvision's with grouped norms."""
    model = resnet18(
        num_classes=3, stem="cifar", norm_layer=functools.partial(FusedBatchNorm2d, ghost_batch_size=2)
    ).to(device)
    groups = []
    find = functional.find_call

    def spied(*arguments, **options):
        groups.append(arguments[-1])
        return find(*arguments, **options)

    with mock.patch("resnet_fast.nn.find_call", spied):
        x = torch.randn(5, 3, 16, 16, device=device)
        fused = model(x)
    assert groups == [2] * 17  # of 20 batch norms three are joined
    with mock.patch("resnet_fast.models.blocks.is_observed", return_value=True):
        step_by_step = model(x)
    torch.testing.assert_close(fused, step_by_step, rtol=1e-4, atol=1e-4)  # twenty layers of fp32 roundings


def test_blocks_of_different_groups_run_step_by_step(on_aten, device):
    model = resnet18(num_classes=3, stem="cifar", norm_layer=functools.partial(FusedBatchNorm2d, ghost_batch_size=2))
    block = model.layer2[0]
    assert block.can_fuse()
    block.downsample[1].ghost_batch_size = 4
    assert not block.can_fuse()
    model.to(device)(torch.randn(4, 3, 8, 8, device=device))


def test_tiles_do_not_cross_groups():
    """The parts of a last, smaller group alone are left out."""
    for channels_last, programs in itertools.product((True, False), (0, 256)):
        tiling = tiles.choose_tiles(7 * 35, 16, 35, channels_last, 3 * 35, 16, programs)
        assert tiling.n_parts == sum(-(-n // tiling.rows_per_part) for n in (105, 105, 35))
        assert tiling.group_parts == -(-105 // tiling.rows_per_part)
    many = tiles.choose_tiles(512 * 1024, 64, 1024, True, 32 * 1024, 16, 256)
    assert many.n_parts <= 256  # not as many for each group
