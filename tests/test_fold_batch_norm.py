"""A folded model computes what evaluation computes, in every type and on either backend."""

import copy
import pickle

import pytest
import torch
from budget import assert_within_budget
from foreign_models import (
    AkamasterResNet,
    KuangliuResNet,
    PreActivationBlock,
    conv_norm_relu,
    perturbed,
    thin_timm_resnet,
)
from thin_resnet import thin_resnet
from torch import nn
from torchvision import models as torchvision_models
from torchvision.models import resnet as torchvision_resnet

from resnet_fast import FusedBatchNorm2d, convert, fold_batch_norm
from resnet_fast.conversion import FoldedConv2d
from resnet_fast.models import ResidualBlock, ResNetModel, resnet

MODELS = {
    "ours": lambda: thin_resnet(resnet),
    "torchvision": lambda: thin_resnet(torchvision_resnet),
    "converted": lambda: convert(conv_norm_relu()),
    "timm": lambda: thin_timm_resnet(drop_rate=0.5, drop_path_rate=0.5),
    "kuangliu": KuangliuResNet,
    "akamaster": AkamasterResNet,
    "pre-activation": lambda: PreActivationBlock(3),
    "Sequential": conv_norm_relu,
}
N_NORMS = {"pre-activation": (1, 1)}  # folded, and left: of the others all are folded


def images(device, dtype: torch.dtype, name: str = "") -> torch.Tensor:
    size = 32 if name == "timm" else 8
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x.to(device, dtype, memory_format=torch.channels_last)


def assert_same_in_fp64(found: torch.Tensor, expected: torch.Tensor) -> None:
    """fp64 rounds at 1e-16; folding rounds at other places, which layers make 1e-14. A wrong step shows at 1e-2."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def make(name: str, device="cpu") -> nn.Module:
    torch.manual_seed(0)
    return perturbed(MODELS[name]()).to(device, memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "dtype"),
    (
        ("ours", torch.float32),
        ("pre-activation", torch.float32),
        ("torchvision", torch.bfloat16),
        ("torchvision", torch.float16),
    ),
    ids=str,
)
def test_within_the_budget_of_evaluation(name, dtype, device, either_backend):
    model = make(name, device).to(dtype).eval()
    folded = fold_batch_norm(model)
    x = images(device, dtype, name)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        exact = copy.deepcopy(model).double()(x.double())
        assert_within_budget("logits", folded(x), model(x), exact)


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_behind_a_convolution_is_gone_and_in_fp64_it_is_evaluation(name, on_aten):
    model = make(name).double().eval()
    folded, x = fold_batch_norm(model), images("cpu", torch.float64, name)
    assert_same_in_fp64(folded(x), model(x))
    n_norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    kinds = [type(module) for module in folded.modules()]
    assert (kinds.count(FoldedConv2d), kinds.count(FusedBatchNorm2d)) == N_NORMS.get(name, (n_norms, 0))
    assert nn.BatchNorm2d not in kinds


@pytest.mark.parametrize("name", ("torchvision", "ours"))
def test_additions_and_relus_run_in_the_convolutions(name):
    folded = fold_batch_norm(make(name))
    targets = [str(node.target) for node in folded.graph.nodes if node.op in ("call_function", "call_method")]
    assert not [target for target in targets if "relu" in target or "add" in target]
    assert not [node for node in folded.graph.nodes if "relu" in str(node.target)]


def test_the_model_is_left_as_it_is():
    model = convert(make("torchvision"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    folded = fold_batch_norm(model)
    assert model.training and not any(module.training for module in folded.modules())
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in folded.parameters()}


def test_it_can_be_kept():
    folded, x = fold_batch_norm(make("kuangliu")), images("cpu", torch.float32)
    loaded = fold_batch_norm(KuangliuResNet())
    loaded.load_state_dict(folded.state_dict(), strict=True)
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), loaded):
        assert torch.equal(other(x), folded(x))


def test_compile_and_export_take_it(on_aten):
    folded, x = fold_batch_norm(make("Sequential")), images("cpu", torch.float32)
    with torch.no_grad():
        expected = folded(x)
        assert torch.equal(torch.compile(folded, fullgraph=True, backend="aot_eager")(x), expected)
        assert torch.equal(torch.export.export(folded, (x,)).module()(x), expected)


def test_gradients_flow(device, on_aten):
    """To the input, as attacks and saliency maps want it."""
    model, x = make("torchvision", device).eval(), images(device, torch.float32)

    def gradient(network, x):
        x = x.clone().requires_grad_()
        network(x).square().sum().backward()
        return x.grad

    exact = gradient(copy.deepcopy(model).double(), x.double())
    assert_within_budget("dx", gradient(fold_batch_norm(model), x), gradient(model, x), exact)


@pytest.mark.parametrize(
    ("kwargs", "norm"),
    (
        ({"padding_mode": "reflect", "padding": 1}, {}),
        ({"groups": 2}, {"affine": False}),
        ({"dilation": 2}, {}),
        ({"bias": False}, {"affine": False}),
    ),
)
def test_every_kind_of_convolution(kwargs, norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, **kwargs), nn.BatchNorm2d(6, **norm), nn.ReLU()).double()
    with torch.no_grad():
        model.train()(5 + torch.randn(8, 4, 7, 7, dtype=torch.float64))
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    assert_same_in_fp64(fold_batch_norm(model)(x), model.eval()(x))


def test_a_relu_of_the_norms_own():
    """FusedBatchNorm2d(relu=True): the addition behind it comes after its ReLU."""

    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), FusedBatchNorm2d(3, relu=True)

        def forward(self, x):
            return torch.relu(self.bn(self.conv(x)) + x)

    model = Adds().double().eval()
    x = images("cpu", torch.float64)
    folded = fold_batch_norm(model)
    assert_same_in_fp64(folded(x), model(x))
    assert any(isinstance(module, FoldedConv2d) and module.relu for module in folded.modules())


def test_an_input_that_another_step_may_change_is_read_where_it_was():
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            x = x + 0
            y = self.bn(self.conv(x))
            x.mul_(2)
            return torch.relu(y + x)

    model = Changes().double().eval()
    x = images("cpu", torch.float64)
    assert_same_in_fp64(fold_batch_norm(model)(x), model(x))


def test_a_residual_of_another_shape_is_broadcast(device, on_aten):
    class Broadcasts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            return torch.relu(self.bn(self.conv(x)) + x.mean((1, 2, 3), keepdim=True))

    model, x = Broadcasts().to(device).eval(), images(device, torch.float32)
    exact = copy.deepcopy(model).double()(x.double())
    assert_within_budget("y", fold_batch_norm(model)(x), model(x), exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("densenet121", "googlenet"))
def test_torchvisions_networks(name, on_aten):
    torch.manual_seed(0)
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    model = perturbed(getattr(torchvision_models, name)(**kwargs)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert_within_budget("logits", fold_batch_norm(model)(x), model(x), exact)


class Branches(nn.Module):
    """torch.fx cannot follow its forward."""

    def __init__(self):
        super().__init__()
        self.block, self.conv, self.bn = conv_norm_relu(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.block(x)
        return self.bn(self.conv(y)) if y.sum() > 0 else y[:, :3]


def test_a_module_that_torch_fx_cannot_follow_is_called_as_it_is():
    model = perturbed(nn.Sequential(Branches(), conv_norm_relu())).double()
    folded = fold_batch_norm(model)
    assert type(folded.get_submodule("0")) is Branches and type(folded.get_submodule("0.block.1")) is nn.BatchNorm2d
    x = images("cpu", torch.float64)
    assert_same_in_fp64(folded(x), model.eval()(x))


def test_the_articles_network_shares_its_norms_and_is_folded_whole(on_aten):
    torch.manual_seed(0)
    model = perturbed(ResNetModel([ResidualBlock(64, 12, stride=2), ResidualBlock(12, 8, False)], 10)).double().eval()
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    assert_same_in_fp64(folded(x), model(x))


def _hook(model):
    model.layer1[0].register_forward_hook(lambda *_: None)
    return model


def _patch(model):
    model.layer1[0].conv1.forward = lambda x: x
    return model


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(torch.relu(self.bn(x)))


REFUSED = {
    "no module": (lambda: None, TypeError, "model must be an nn.Module, got NoneType"),
    "1-D": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        ValueError,
        "1 is a BatchNorm1d, not an nn.BatchNorm2d",
    ),
    "no norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), ValueError, "it has no batch norm"),
    "no convolution": (PreActivation, ValueError, "bn does not follow an nn.Conv2d"),
    "a part that branches": (
        lambda: nn.Sequential(Branches()),
        ValueError,
        "model cannot be folded: 0: torch.fx cannot follow its forward",
    ),
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        ValueError,
        "1 has no running statistics",
    ),
    "a layer": (lambda: nn.BatchNorm2d(3), ValueError, "it holds no modules"),
    "branches": (Branches, ValueError, "model cannot be folded: torch.fx cannot follow its forward"),
    "compiled": (lambda: torch.compile(KuangliuResNet()), ValueError, "before torch.compile"),
    "hook": (lambda: _hook(KuangliuResNet()), ValueError, "layer1.0 must have no hooks and no patched forward"),
    "patch": (lambda: _patch(KuangliuResNet()), ValueError, "layer1.0.conv1 must have no hooks and no patched forward"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_folded_is_refused_with_the_reason(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        fold_batch_norm(make())
