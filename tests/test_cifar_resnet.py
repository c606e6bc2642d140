"""The 6n+2 networks are the paper's, and compute the same as a network of plain PyTorch layers."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from torch import Tensor, fx, nn

import resnet_fast
from resnet_fast import FusedBatchNorm2d, functional
from resnet_fast.models import CifarResNet, blocks
from resnet_fast.models.blocks import PaddedShortcut

pytestmark = pytest.mark.usefixtures("one_thread")

DEPTHS = (20, 32, 44, 56, 110)
COUNTS = dict(zip(DEPTHS, (269_722, 464_154, 658_586, 853_018, 1_727_962), strict=True))
SHORTCUTS = ("A", "B", None)
MORE = (("B", True), (None, False))
LAYOUTS = (torch.contiguous_format, torch.channels_last)  # the network computes in the last


def plain_pytorch(model: CifarResNet, x: Tensor) -> Tensor:
    """The forward of section 4.2, over the model's weights, in torch's own functions."""

    def norm(name: str, y: Tensor) -> Tensor:
        module = model.get_submodule(name)
        if model.training:
            module.num_batches_tracked += 1
        statistics = module.running_mean, module.running_var
        return F.batch_norm(y, *statistics, module.weight, module.bias, model.training, 0.1, 1e-5)

    def conv(name: str, y: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(y, model.get_submodule(name).weight, None, stride, padding)

    y = F.relu(norm("bn1", conv("conv1", x)))
    for stage in (1, 2, 3):
        for i in range((model.depth - 2) // 6):
            at, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            z = F.relu(norm(f"{at}.bn1", conv(f"{at}.conv1", y, stride)))
            z = norm(f"{at}.bn2", conv(f"{at}.conv2", z))
            if model.shortcut is not None:
                skip = y
                if stride == 2 and model.shortcut == "A":
                    skip = torch.cat([y[:, :, ::2, ::2], torch.zeros_like(y[:, :, ::2, ::2])], 1)
                elif stride == 2:
                    skip = norm(f"{at}.downsample.1", conv(f"{at}.downsample.0", y, 2, 0))
                z = z + skip
            y = F.relu(z)
    return F.linear(y.mean((2, 3)), model.fc.weight, model.fc.bias)


def tiny(shortcut: str | None, depth: int = 14, width: int = 8, **kwargs) -> CifarResNet:
    """With parameters and statistics that are not ones and zeros, which hide errors."""
    torch.manual_seed(0)
    model = CifarResNet(depth, 10, shortcut=shortcut, width=width, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model


def one_step(model: nn.Module, forward, x: Tensor) -> dict[str, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    logits = forward(x)
    F.cross_entropy(logits, torch.arange(len(x), device=x.device)).backward()
    found = {"logits": logits.detach(), "dx": x.grad}
    found |= {f"d {name}": parameter.grad for name, parameter in model.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def plain_step(model: CifarResNet, x: Tensor) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(x.dtype)
    return one_step(model, lambda x: plain_pytorch(model, x), x)


def images(device="cpu", size: tuple[int, int] = (8, 8), n: int = 4) -> Tensor:
    x = torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1))
    return x.to(device).contiguous(memory_format=torch.channels_last)


def n_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", (*(f"resnet{depth}" for depth in DEPTHS), "plain20"))
def test_counts(name):
    """Option A has no parameters, so that a plain network has as many."""
    depth = int(name.removeprefix("resnet").removeprefix("plain"))
    with torch.device("meta"):
        model = getattr(resnet_fast, name)()
    assert n_parameters(model) == COUNTS[depth]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) + 1 == model.depth == depth


def test_counts_of_projections():
    """Two of them: a 1x1 convolution without bias, and a weight and a bias for each of its outputs."""
    width = 12
    projections = sum(c_in * 2 * c_in + 2 * 2 * c_in for c_in in (width, 2 * width))
    options = (resnet_fast.resnet20(shortcut=shortcut, width=width) for shortcut in ("A", "B"))
    identity, projected = map(n_parameters, options)
    assert projected == identity + projections


@pytest.mark.parametrize(("shortcut", "training"), (("A", True), ("B", True), (None, False)))
def test_on_aten_it_is_plain_pytorchs_to_the_bit(shortcut, training, on_aten):
    model = tiny(shortcut, depth=20).train(training)
    x = images(size=(9, 7))
    expected, found = plain_step(model, x), one_step(model, model, x)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize(
    ("shortcut", "training"), (("A", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE))
)
def test_on_triton_within_the_budget(shortcut, training, device):
    model = tiny(shortcut, depth=8).to(device).train(training)
    x = images(device)
    exact = plain_step(model, x.double())
    # Another layout adds up in another order.
    expected = [plain_step(model.to(memory_format=layout), x.contiguous(memory_format=layout)) for layout in LAYOUTS]
    found = one_step(model, model, x)
    assert all(found[name] == exact[name] for name in found if name.endswith("num_batches_tracked"))
    # Eight channels can all be right by luck, for eager: so results of a kind are compared as one vector.
    for kind in ("logits", "dx", "d .*conv|d fc", "d .*bn|d .*downsample.1", ".*running_mean", ".*running_var"):
        names = [name for name in found if re.match(kind, name)]
        ours, *eager, true = (
            torch.cat([result[name].flatten() for name in names]) for result in (found, *expected, exact)
        )
        assert_within_budget(kind, ours, eager, true)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_hook_makes_it_run_step_by_step_with_the_same_numbers(shortcut, on_aten):
    model, seen = tiny(shortcut), []
    fused, x = copy.deepcopy(model), images()
    model.layer2[0].relu.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    assert fused._blocks_to_fuse(x) and not model._blocks_to_fuse(x)
    found, expected = one_step(model, model, x), one_step(fused, fused, x)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert [output.shape for output in seen] == 2 * [(4, 16, 4, 4)]


@pytest.mark.parametrize("shortcut", ("A", "B"))
def test_torch_fx_sees_every_step(shortcut, on_aten):
    model = tiny(shortcut).eval()
    traced = fx.symbolic_trace(model)
    names = {node.target for node in traced.graph.nodes}
    assert {"layer3.1.bn2", "layer3.1.relu"} <= names
    assert torch.equal(traced(images()), model(images()))


def test_a_patched_shortcut_is_seen(on_aten):
    model = tiny("A")
    shortcut = model.layer2[0].downsample
    shortcut.forward = lambda x: 0 * PaddedShortcut.forward(shortcut, x)
    assert not model._blocks_to_fuse(images())
    assert not torch.equal(model(images()), tiny("A")(images()))


@pytest.mark.parametrize("shortcut", ("A", "B"))
def test_another_norm_is_not_fused(shortcut, on_aten):
    model, fused = tiny(shortcut, norm_layer=nn.BatchNorm2d), tiny(shortcut)
    assert not model._blocks_to_fuse(images()) and fused._blocks_to_fuse(images())
    assert not any(isinstance(module, FusedBatchNorm2d) for module in model.modules())
    assert torch.equal(model(images()), fused(images()))
    CifarResNet(8, shortcut=shortcut, norm_layer=lambda channels: nn.GroupNorm(4, channels))(images())


def test_every_join_is_one_operation(monkeypatch, on_aten):
    """With option B: a stem, then two operations to a block, the projection's batch norm within the second."""
    calls, find = [], functional.find_call

    def noted(*args):
        def call(*tensors):
            calls.append((*args[:5], tensors[-1]))
            return find(*args)(*tensors)

        return call

    monkeypatch.setattr("resnet_fast.nn.find_call", noted)
    tiny("B", depth=14)(images())
    assert len(calls) == 1 + 2 * 6
    assert sum(args[3] is not None for args in calls) == 2
    # relu and fork: every output but the last has two consumers where a block begins with it.
    assert [args[5] for args in calls] == [True] + 5 * [False, True] + [False, False]
    calls.clear()
    tiny(None, depth=14)(images())
    assert len(calls) == 1 + 2 * 6 and all(args[2] is None and args[4] for args in calls)


@pytest.mark.parametrize(("size", "stride"), (((6, 6), 2), ((7, 5), 2), ((1, 1), 2), ((6, 6), 1)))
def test_option_a_against_its_definition(size, stride):
    x = torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last)
    y = PaddedShortcut(3, 8, stride)(x)
    height, width = (-(-side // stride) for side in size)
    assert y.shape == (2, 8, height, width)
    for i in range(height):
        for j in range(width):
            assert torch.equal(y[:, :3, i, j], x[:, :, stride * i, stride * j])
    assert (y[:, 3:] == 0).all() and n_parameters(PaddedShortcut(3, 8, stride)) == 0
    if size == (6, 6):
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_other_sizes_and_layouts(shortcut, on_aten):
    size = (5, 9)
    model = tiny(shortcut, depth=8).eval()
    x = images(size=size)
    torch.testing.assert_close(model(x), model(x.contiguous()), rtol=1e-4, atol=1e-4)  # eight layers of fp32 roundings
    assert model(x).shape == (4, 10)


def test_plain_has_the_keys_of_option_a_and_from_one_seed_its_weights():
    states = []
    for shortcut in ("A", None):
        torch.manual_seed(0)
        states.append(CifarResNet(14, shortcut=shortcut).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_weights_start_as_in_the_paper():
    """Variance 2 / fan_in; of so many samples the standard deviation is within 5 % of it, ten of its own."""
    torch.manual_seed(0)
    model = resnet_fast.resnet110(shortcut="B")
    for stage in (model.layer2, model.layer3):
        weights = torch.cat([block.conv2.weight.flatten() for block in stage])
        fan_in = stage[0].conv2.in_channels * 9
        assert weights.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
    assert model.fc.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.15)
    assert (model.fc.bias == 0).all()


def test_it_trains_under_autocast_and_keeps_the_blocks_fused(monkeypatch, on_aten):
    seen, find = [], blocks.blocks_to_fuse
    monkeypatch.setattr("resnet_fast.models.cifar.blocks_to_fuse", lambda *args: seen.append(find(*args)) or seen[-1])
    model = tiny("A")
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(model(images()), torch.tensor([0, 1, 2, 0])).backward()
    assert len(seen[0]) == 6 and all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (21, "got 21; the nearest are 20 and 26"),
        (2, "got 2; the smallest is 8"),
        (True, "got True"),
        ("20", "got '20'"),
    ],
)
def test_another_depth_is_refused(depth, message):
    with pytest.raises(ValueError, match=r"^depth must be 6n\+2 for an integer n of at least 1") as raised:
        CifarResNet(depth)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shortcut": "C"}, "shortcut must be 'A', 'B' or None, got 'C'"),
        ({"width": 0}, "width must be an integer of at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
    ],
)
def test_other_values_are_refused(kwargs, message):
    with pytest.raises(ValueError) as raised:
        resnet_fast.resnet20(**kwargs)
    assert str(raised.value) == message


def test_a_padded_shortcut_drops_no_channels():
    with pytest.raises(ValueError, match="^out_channels must be at least in_channels, got 4 for 8$"):
        PaddedShortcut(8, 4, 1)
