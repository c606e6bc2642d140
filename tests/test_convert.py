"""A converted model computes the same as before: outputs, gradients, statistics, in training and evaluation."""

import copy
from collections import Counter

import pytest
import torch
from budget import assert_within_budget
from foreign_models import (
    AkamasterResNet,
    KuangliuResNet,
    PreActivationBlock,
    conv_norm_relu,
    perturbed,
    step,
    thin_timm_resnet,
)
from thin_resnet import thin_resnet
from torch import nn
from torchvision import models as torchvision_models
from torchvision.models import resnet as torchvision_resnet

from resnet_fast import FusedBatchNorm2d, convert, fold_batch_norm
from resnet_fast.conversion import rewrite

ALL = "BN+ReLU BN+add+ReLU BN+BN+add+ReLU".split()
THIN = {
    "torchvision": (lambda: thin_resnet(torchvision_resnet), ALL),
    "timm, average pooling before the projection": (lambda: thin_timm_resnet(avg_down=True), ALL),
    "kuangliu": (KuangliuResNet, ALL),
    "akamaster": (AkamasterResNet, ALL[:2]),
    "pre-activation": (lambda: PreActivationBlock(3), ["BN+ReLU"]),
    "Sequential": (conv_norm_relu, ["BN+ReLU"]),
}


def make_pair(make, device="cpu") -> tuple[nn.Module, nn.Module]:
    """A model converted, and as it was."""
    torch.manual_seed(0)
    theirs = perturbed(make()).to(device, memory_format=torch.channels_last)
    return convert(copy.deepcopy(theirs)), theirs


def size_for(name: str) -> int:
    """timm's stem has stride 4."""
    return 32 if name.startswith("timm") else 8


def images(device, size: int = 8) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize(("name", "training"), (("torchvision", True), ("pre-activation", False)))
def test_within_the_budget(name, training, device, one_thread):
    """On the kernels."""
    ours, theirs = (model.train(training) for model in make_pair(THIN[name][0], device))
    x = images(device, size_for(name))
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        found, exact = step(ours, x), step(copy.deepcopy(theirs).double(), x.double())
        layouts = (torch.channels_last, torch.contiguous_format)
        expected = [step(copy.deepcopy(theirs).to(memory_format=layout), x) for layout in layouts]
    assert found.keys() == exact.keys()
    for key in found:
        if key.endswith("num_batches_tracked"):
            assert found[key] == exact[key]
        else:
            assert_within_budget(key, found[key], [result[key] for result in expected], exact[key])


@pytest.mark.parametrize(
    ("name", "autocast", "training"),
    (*((name, False, True) for name in THIN), ("torchvision", True, True), ("kuangliu", False, False)),
)
def test_without_a_gpu_to_the_bit(name, autocast, training, on_aten):
    ours, theirs = (model.train(training) for model in make_pair(THIN[name][0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = step(ours, images("cpu", size_for(name))), step(theirs, images("cpu", size_for(name)))
    assert found.keys() == expected.keys()
    for key in found:
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("name", THIN)
def test_the_fused_operations_run_that_the_report_names(name, on_aten, monkeypatch):
    """As many in one forward as it says: a joined pair of norms is one."""
    make, operations = THIN[name]
    model, report = convert(make(), report=True)
    assert not report.left
    assert {outcome.what for outcome in report.converted} == set(operations)
    assert len(report.converted) == sum(type(module) is FusedBatchNorm2d for module in model.modules())
    calls, fused = [], FusedBatchNorm2d.fused

    def counted(self, x, residual=None, residual_norm=None, **kwargs):
        calls.append("+".join(["BN"] * (1 + (residual_norm is not None)) + ["add"] * (residual is not None)))
        return fused(self, x, residual, residual_norm, **kwargs)

    monkeypatch.setattr(FusedBatchNorm2d, "fused", counted)
    model(images("cpu", size_for(name)))
    counts = Counter(outcome.what.removesuffix("+ReLU") for outcome in report.converted)
    counts["BN+BN+add"] //= 2
    assert Counter(calls) == +counts


def test_two_readers_of_a_block_get_a_handle_each(on_aten, monkeypatch):
    """So that the kernel adds their gradients; in kuangliu's, every block's output but the last, and the stem's."""
    model, forks = convert(KuangliuResNet()), []
    forward = model.__dict__["_fused"].forward
    name = next(name for name, value in forward.__globals__.items() if value is rewrite.fused_steps)

    def counted(*args, **kwargs):
        forks.append(kwargs.get("fork", False))
        return rewrite.fused_steps(*args, **kwargs)

    monkeypatch.setitem(forward.__globals__, name, counted)
    model(images("cpu"))
    assert forks == [True, False, True, False, True, False, False]


def test_a_value_that_is_changed_in_place_gets_no_second_handle(on_aten):
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.conv2 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = torch.relu(self.bn(self.conv(x)))
            z = self.conv2(y)
            y += 1
            return z + y

    ours, theirs = (model.eval() for model in make_pair(Changes))
    with torch.no_grad():
        assert torch.equal(ours(images("cpu")), theirs(images("cpu")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ("resnet50", "resnext50_32x4d"))
def test_torchvisions_networks(name, on_aten):
    ours, theirs = make_pair(lambda: getattr(torchvision_models, name)(num_classes=3))
    assert {outcome.what for outcome in convert(ours, report=True)[1].outcomes} == set(ALL)
    found, expected = step(ours, images("cpu", 32)), step(theirs, images("cpu", 32))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("seresnet18", "ecaresnet26t"))
def test_timms_networks(name, on_aten):
    """All norms are converted, before an attention module alone or with a ReLU."""
    import timm

    ours, theirs = make_pair(lambda: timm.create_model(name, num_classes=3))
    assert not convert(ours, report=True)[1].left
    found, expected = step(ours, images("cpu", 64)), step(theirs, images("cpu", 64))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "operations"),
    (
        ("mobilenet_v2", {"BN": 42, "BN+add": 10}),
        ("googlenet", {"BN+ReLU": 57}),
    ),
)
def test_other_networks_of_torchvision(name, operations, on_aten):
    """Whatever torch.fx can follow of them; without dropout, whose random numbers differ."""
    kwargs = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    ours, theirs = make_pair(lambda: getattr(torchvision_models, name)(num_classes=3, **kwargs))
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert Counter(outcome.what for outcome in convert(ours, report=True)[1].outcomes) == operations
    found, expected = step(ours, images("cpu", 32)), step(theirs, images("cpu", 32))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


class Adds(nn.Module):
    """relu(bn(conv(x)) + r), in place or not, where r may have another shape or type."""

    def __init__(self, residual, in_place: str = ""):
        super().__init__()
        self.conv, self.bn, self.residual, self.in_place = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), residual, in_place

    def forward(self, x):
        y, residual = self.bn(self.conv(x)), self.residual(x)
        if self.in_place == "norm":
            y += residual
        elif self.in_place == "residual":
            residual = residual * 1
            residual += y
            y = residual
        else:
            y = y + residual
        return torch.relu(y)


def mean_of_all(x):
    return x.mean((1, 2, 3), keepdim=True)


def first_channel_in_fp64(x):
    return x[:, :1].expand(-1, 4, -1, -1).double()


def first_channel_in_bf16(x):
    return x[:, :1].expand(-1, 4, -1, -1).bfloat16()


def larger(x):
    return x[:, :1].expand(-1, 4, -1, -1).unsqueeze(0)


@pytest.mark.parametrize("fold", (False, True), ids=("convert", "fold"))
@pytest.mark.parametrize(
    ("residual", "in_place"),
    (
        (mean_of_all, "norm"),
        (first_channel_in_fp64, ""),
        (first_channel_in_fp64, "residual"),
        (first_channel_in_bf16, "residual"),
        (larger, ""),
    ),
)
def test_a_residual_is_broadcast_and_promoted_as_in_eager(residual, in_place, fold, on_aten):
    theirs = perturbed(Adds(residual, in_place)).eval()
    ours, report = convert(copy.deepcopy(theirs), report=True)
    assert report.outcomes[0].what == "BN+add+ReLU"
    found, expected = (fold_batch_norm(ours) if fold else ours)(images("cpu")), theirs(images("cpu"))
    assert found.dtype == expected.dtype
    if not fold:
        assert torch.equal(found, expected)
    else:  # folded weights were rounded to fp32: torch's own tolerance of that, or of bf16
        coarse = torch.bfloat16 if found.dtype == torch.bfloat16 else torch.float32
        torch.testing.assert_close(found.to(coarse), expected.to(coarse))


def test_a_larger_residual_is_refused_in_place_as_in_eager(on_aten):
    for model in (convert(Adds(larger, "norm")), fold_batch_norm(Adds(larger, "norm"))):
        with pytest.raises(RuntimeError, match="output with shape"):
            model(images("cpu"))


def test_a_block_of_torchvision_under_autocast_keeps_its_type(on_aten):
    """Its input is fp32 and its addition in place, in bf16."""
    ours, theirs = make_pair(lambda: torchvision_resnet.BasicBlock(3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(images("cpu")), theirs(images("cpu"))
    assert found.dtype == expected.dtype == torch.bfloat16 and torch.equal(found, expected)
