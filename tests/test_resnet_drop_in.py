"""`from resnet_fast import resnet18` instead of torchvision's: signature, keys, initialization, hooks, surgery.

A step left out or taken twice changes outputs by percents. How exact they are is the parity tests' claim; the
tolerances here allow twenty layers of fp32 roundings, which batch norm over few values makes larger.
"""

import functools
import inspect

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models
from torchvision.models.feature_extraction import create_feature_extractor

import resnet_fast
from resnet_fast.models.resnet import BasicBlock
from resnet_fast.nn import FusedBatchNorm2d

# Which steps are fused does not depend on what computes them, and interpreted kernels take a whole network minutes.
pytestmark = pytest.mark.usefixtures("on_aten")

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def pair(**kwargs) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's from the same seed."""
    models = []
    for module in (resnet_fast, torchvision_models):
        torch.manual_seed(0)
        models.append(module.resnet18(**kwargs))
    return models[0], models[1]


def test_signatures():
    for name in NAMES:
        ours, theirs = (inspect.signature(getattr(m, name)) for m in (resnet_fast, torchvision_models))
        assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
            (p.name, p.kind, p.default) for p in theirs.parameters.values()
        ], name


def test_signature_of_the_class():
    *ours, stem = inspect.signature(resnet_fast.models.resnet.ResNet).parameters.values()
    theirs = inspect.signature(torchvision_models.ResNet).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]
    assert (stem.name, stem.kind) == ("stem", stem.KEYWORD_ONLY)


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes(name):
    with torch.device("meta"):
        ours, theirs = (getattr(module, name)().state_dict() for module in (resnet_fast, torchvision_models))
    assert list(ours) == list(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in ours)


@pytest.mark.parametrize("name", ("resnet18", "resnet50"))
def test_initial_weights(name):
    states = []
    for module in (resnet_fast, torchvision_models):
        torch.manual_seed(0)
        states.append(getattr(module, name)(num_classes=7).state_dict())
    ours, theirs = states
    for key in ours:
        assert torch.equal(ours[key], theirs[key]) and ours[key].stride() == theirs[key].stride(), key


@pytest.mark.parametrize(
    "kwargs",
    (
        {"zero_init_residual": True},
        {"norm_layer": functools.partial(nn.GroupNorm, 8)},
        {"norm_layer": nn.BatchNorm2d},
        {"norm_layer": functools.partial(FusedBatchNorm2d, eps=1e-3, momentum=None)},
    ),
    ids=str,
)
def test_keyword_arguments(kwargs):
    theirs_kwargs = dict(kwargs)
    if getattr(kwargs.get("norm_layer"), "func", None) is FusedBatchNorm2d:
        theirs_kwargs["norm_layer"] = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=None)
    ours, _ = pair(num_classes=5, **kwargs)
    _, theirs = pair(num_classes=5, **theirs_kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 3, 33, 33)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_groups_and_dilation_of_a_bottleneck():
    kwargs = {"groups": 2, "width_per_group": 32, "replace_stride_with_dilation": [False, True, True], "num_classes": 5}
    torch.manual_seed(0)
    ours = resnet_fast.resnet50(**kwargs).eval()
    theirs = torchvision_models.resnet50(**kwargs).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 33, 33)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_cifar_stem():
    model = resnet_fast.resnet18(num_classes=10, stem="cifar")
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    assert model.layer1(model.maxpool(model.bn1(model.conv1(torch.randn(1, 3, 32, 32))))).shape == (1, 64, 32, 32)
    with pytest.raises(ValueError, match="stem must be 'imagenet' or 'cifar', got 'mnist'"):
        resnet_fast.resnet18(stem="mnist")


def test_same_classes_and_module_names():
    ours, theirs = pair()
    assert isinstance(ours, torchvision_models.ResNet)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert all(isinstance(m, nn.BatchNorm2d) for n, m in ours.named_modules() if n.rsplit(".")[-1].startswith("bn"))


def test_hooks_see_what_they_see_in_torchvision():
    """Every module's output and the whole gradient of every activation, none of them fused away."""
    seen = []
    for model in pair(num_classes=5):
        model = model.to(memory_format=torch.channels_last)
        outputs = {}
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda m, args, out, n=name, o=outputs: o.setdefault(n, []).append(out.clone())
            )
        x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
        model(x)
        seen.append(outputs)
    assert seen[0].keys() == seen[1].keys()
    for name in seen[0]:
        for ours, theirs in zip(seen[0][name], seen[1][name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_gradient_of_an_activation_is_whole_where_a_hook_hands_it_out():
    """Grad-CAM: a hook on a stage keeps its output; its gradient must hold both consumers' share."""
    gradients = []
    for model in pair(num_classes=5):
        kept = []
        model.layer2.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
        x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
        logits = model.to(memory_format=torch.channels_last)(x)
        gradients.append(torch.autograd.grad(logits[:, 0].sum(), kept[0])[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def swap_a_norm(model):
    model.layer2[0].bn2 = nn.GroupNorm(8, 128)


def swap_a_projection(model):
    model.layer2[0].downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(64, 128, 1), nn.BatchNorm2d(128))


def wrap_a_block(model):
    model.layer3[1] = nn.Sequential(model.layer3[1], nn.Dropout(0.0))


def patch_a_forward(model):
    block = model.layer1[0]
    block.relu.forward = torch.tanh
    original = model.layer3[0].forward
    model.layer3[0].forward = lambda x: 3 * original(x)


@pytest.mark.parametrize(
    "surgery",
    (patch_a_forward, swap_a_norm, swap_a_projection, wrap_a_block),
)
def test_surgery_is_honored(surgery):
    """What users put in place of a layer is what runs."""
    ours, theirs = pair(num_classes=5)
    for model in (ours, theirs):
        torch.manual_seed(1)
        surgery(model)
        model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


def test_a_block_alone(device):
    torch.manual_seed(0)
    ours = BasicBlock(16, 16, norm_layer=FusedBatchNorm2d).to(device)
    theirs = torchvision_models.resnet.BasicBlock(16, 16).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 6, 6, device=device)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_feature_extractor():
    ours, theirs = (model.eval() for model in pair(num_classes=5))
    x = torch.randn(1, 3, 64, 64)
    nodes = {"layer2": "features", "fc": "logits"}
    found, expected = (create_feature_extractor(model, nodes)(x) for model in (ours, theirs))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_a_traced_model_keeps_its_modes():
    """Batch norms are steps of their own in an fx graph, whose mode may change after tracing."""
    for model in pair(num_classes=5):
        traced = torch.fx.symbolic_trace(model.train())
        assert sum(node.op == "call_module" and "bn" in node.target for node in traced.graph.nodes) == 17
        x = torch.randn(2, 3, 40, 40)
        assert torch.equal(traced.eval()(x), model.eval()(x))
        before = model.bn1.running_mean.clone()
        traced.train()(x)
        assert not torch.equal(traced.bn1.running_mean, before)


def test_fused_operations_run_where_nothing_is_in_the_way(monkeypatch):
    """Without this, every test above would pass on torchvision's forward alone."""
    calls = []
    original = FusedBatchNorm2d.fused
    monkeypatch.setattr(FusedBatchNorm2d, "fused", lambda self, *a, **k: calls.append(k) or original(self, *a, **k))
    model = resnet_fast.resnet18(num_classes=5, stem="cifar")
    model(torch.randn(2, 3, 16, 16))
    assert len(calls) == 17, "20 batch norms, three of them in the projections' joins"
    assert sum(call.get("fork", False) for call in calls) == 8, "the stem's output and seven blocks'"
