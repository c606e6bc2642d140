"""A network's structure is analyzed once, and a change after the first call has the same effect as one before it."""

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from thin_resnet import thin_resnet
from torch import Tensor, nn

from resnet_fast import FusedBatchNorm2d
from resnet_fast.models import resnet

pytestmark = pytest.mark.usefixtures("on_aten")


def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def halve(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output / 2


def hook(model: nn.Module) -> None:
    model.layer1[0].bn1.register_forward_hook(halve)


def hook_in_a_new_dictionary(model: nn.Module) -> None:
    model.layer1[0].bn1._forward_hooks = OrderedDict()
    hook(model)


def patched_forward(model: nn.Module) -> None:
    model.layer1[0].relu.forward = lambda x: x


def other_norm(model: nn.Module) -> None:
    model.layer2[0].bn2 = nn.GroupNorm(2, model.layer2[0].bn2.num_features)


def other_activation(model: nn.Module) -> None:
    model.layer1[0].relu = nn.GELU()


def other_stage(model: nn.Module) -> None:
    model.layer1 = nn.Sequential(nn.Identity())


def other_class(model: nn.Module) -> None:
    model.layer1[0].relu.__class__ = nn.Tanh
    model.layer1[0].relu.forward = nn.Tanh.forward.__get__(model.layer1[0].relu)


def norm_with_relu(model: nn.Module) -> None:
    model.layer1[0].bn2.relu = True


def groups_of_its_own(model: nn.Module) -> None:
    model.layer2[0].downsample[1].ghost_batch_size = 2


CHANGES = (
    hook, hook_in_a_new_dictionary, patched_forward, other_norm, other_activation, other_stage, other_class,
    norm_with_relu, groups_of_its_own,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_a_call_is_seen(change: Callable[[nn.Module], None]):
    model = thin_resnet(resnet).eval()
    fresh, before = copy.deepcopy(model), model(images())
    assert model._blocks_to_fuse(images())
    change(model)
    change(fresh)
    model.train(), fresh.train()
    found, expected = model(images()), fresh(images())
    assert torch.equal(found, expected)
    assert not model._blocks_to_fuse(images()) and not torch.equal(before, found)


def test_a_hook_that_is_gone_leaves_the_network_fused():
    model = thin_resnet(resnet)
    model(images())
    handle = model.layer1[0].bn1.register_forward_hook(halve)
    assert not model._blocks_to_fuse(images())
    handle.remove()
    assert model._blocks_to_fuse(images())


def test_a_network_that_was_called_is_freed():
    model = thin_resnet(resnet)
    model(images())
    weight = weakref.ref(model.fc.weight)
    del model
    gc.collect()
    assert weight() is None


def test_a_copy_is_looked_at_by_itself():
    model = thin_resnet(resnet)
    model(images())
    clone = copy.deepcopy(model)
    clone.layer1[0].bn1 = nn.BatchNorm2d(clone.layer1[0].bn1.num_features)
    assert not clone._blocks_to_fuse(images()) and model._blocks_to_fuse(images())
    assert isinstance(model.layer1[0].bn1, FusedBatchNorm2d)
