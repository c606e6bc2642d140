"""A copied, pickled or reloaded module is equal; state dicts, old ones too, go to and from nn.BatchNorm2d."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from thin_resnet import images, pair
from torch import nn

from resnet_fast import FusedBatchNorm2d, FusedSyncBatchNorm2d


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # a whole module, which weights_only=True refuses of any class of users


def through_state_dict(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = type(module)(8, relu=module.relu, momentum=module.momentum)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return other


def trained(module: nn.Module) -> nn.Module:
    """With statistics, weights and a gradient that are not the initial ones."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    module(2 + torch.randn(3, 8, 4, 4)).square().sum().backward()
    return module


@pytest.mark.parametrize(
    "duplicate", (copy.copy, copy.deepcopy, through_pickle, through_torch_save, through_state_dict)
)
@pytest.mark.parametrize(
    ("norm", "options"),
    ((FusedBatchNorm2d, {"relu": True}), (FusedSyncBatchNorm2d, {"relu": False, "momentum": None})),
    ids=str,
)
def test_module(norm, options, duplicate, on_aten):
    """With relu=False as well: a copy that always has ReLU would pass the one, a copy that never has the other."""
    module = trained(norm(8, **options))
    clone = duplicate(module)
    assert type(clone) is norm and repr(clone) == repr(module)
    x, residual = torch.randn(2, 3, 8, 4, 4)
    for training in (False, True):
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        y = module.train(training)(x, residual)
        after = {name: buffer.clone() for name, buffer in module.named_buffers()}
        for name, buffer in module.named_buffers():  # copy.copy shares its buffers with the original
            buffer.copy_(before[name])
        assert torch.equal(clone.train(training)(x, residual), y)
        for name, buffer in clone.named_buffers():
            assert torch.equal(buffer, after[name]), name


def test_a_deep_copy_shares_nothing():
    module = trained(FusedBatchNorm2d(8))
    clone = copy.deepcopy(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trained(clone)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("duplicate", (copy.deepcopy, through_pickle))
def test_network(duplicate, on_aten, device):
    """Blocks stay fused in the copy, weights in channels_last, and training goes on alike."""
    model, _ = pair(device)
    model(images(device)).sum().backward()
    clone = duplicate(model)
    assert clone._blocks_to_fuse(images(device)) and len(clone._blocks_to_fuse(images(device))) == 3
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in clone.parameters() if p.dim() == 4)
    for training in (False, True):
        assert torch.equal(clone.train(training)(images(device)), model.train(training)(images(device)))
    for (name, found), expected in zip(clone.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


NORMS = (FusedBatchNorm2d, FusedSyncBatchNorm2d)


@pytest.mark.parametrize("norm", NORMS)
def test_state_dict_goes_both_ways(norm):
    theirs = trained(nn.BatchNorm2d(8))
    ours = norm(8)
    assert ours.load_state_dict(theirs.state_dict(), strict=True) == nn.BatchNorm2d(8).load_state_dict(
        theirs.state_dict(), strict=True
    )
    back = nn.BatchNorm2d(8)
    back.load_state_dict(ours.state_dict(), strict=True)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def of_version_1(state: dict) -> OrderedDict:
    """As torch wrote it before 0.4.1: nobody counted batches."""
    old = OrderedDict((name, tensor) for name, tensor in state.items() if not name.endswith("num_batches_tracked"))
    old._metadata = OrderedDict((name, {"version": 1}) for name in state._metadata)
    return old


@pytest.mark.parametrize(("norm", "metadata"), ((NORMS[0], True), (NORMS[1], False)))
def test_old_state_dict_without_num_batches_tracked(norm, metadata):
    old = of_version_1(trained(nn.BatchNorm2d(8)).state_dict())
    if not metadata:
        old = dict(old)
    found = norm(8)
    found.num_batches_tracked.fill_(7)
    found.load_state_dict(old, strict=True)
    assert found.num_batches_tracked == 7, "torch keeps the module's own"
    assert torch.equal(found.running_var, old["running_var"])


def test_a_new_state_dict_must_hold_num_batches_tracked():
    state = trained(nn.BatchNorm2d(8)).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="Missing key.*num_batches_tracked"):
        FusedBatchNorm2d(8).load_state_dict(state, strict=True)


def test_state_dict_of_a_module_without_statistics():
    norm = FusedBatchNorm2d
    ours, theirs = norm(8, track_running_stats=False), nn.BatchNorm2d(8, track_running_stats=False)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "bias"]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Missing key.*running_mean"):
        norm(8).load_state_dict(theirs.state_dict(), strict=True)


def test_old_checkpoint_of_a_network(device):
    ours, theirs = pair(device)
    ours.load_state_dict(of_version_1(theirs.state_dict()), strict=True)
