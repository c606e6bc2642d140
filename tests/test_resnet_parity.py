"""resnet18 computes what torchvision's computes: logits, loss, every gradient and every buffer."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import thin_resnet
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from fused_op import LAYOUTS
from torch import Tensor, nn
from torchvision import models as torchvision_models

import resnet_fast
from resnet_fast import FusedBatchNorm2d, functional

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE_SIZE = {"cifar": 16, "imagenet": 64}  # 2x2 in the last stage: 16 values per channel


def make_pair(stem: str, layout: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's, with the same weights, in one layout."""
    torch.manual_seed(0)
    ours = resnet_fast.resnet18(num_classes=10, stem=stem)
    theirs = torchvision_models.resnet18(num_classes=10)
    if stem == "cifar":  # as users of torchvision change it
        theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        theirs.maxpool = nn.Identity()
    with torch.no_grad():  # not the initial ones and zeros, which hide errors
        for parameter in ours.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
        for name, buffer in ours.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.8, 1.2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return tuple(model.to(device, memory_format=LAYOUTS[layout]) for model in (ours, theirs))


def make_batch(stem: str, layout: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, IMAGE_SIZE[stem], IMAGE_SIZE[stem], generator=generator)
    return x.to(device).contiguous(memory_format=LAYOUTS[layout]), torch.tensor([3, 1, 4, 1], device=device)


def one_step(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    logits = model(x)
    loss = F.cross_entropy(logits, target)
    loss.backward()
    found = {"logits": logits.detach(), "loss": loss.detach()[None], "dx": x.grad}
    found |= {f"d {name}": parameter.grad for name, parameter in model.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


@contextmanager
def noted_gates() -> Iterator[list[Tensor]]:
    """Where the ReLUs of a forward are open, in order, of ours or of torchvision's."""
    gates: list[Tensor] = []
    fused, relu = FusedBatchNorm2d.fused, nn.ReLU.forward

    def noted_fused(self, *inputs, **settings):
        result = fused(self, *inputs, **settings)
        gates.append((result[0] if settings.get("fork") else result).detach() > 0)
        return result

    def noted_relu(self, x):
        y = relu(self, x)
        gates.append(y.detach() > 0)
        return y

    with mock.patch.object(FusedBatchNorm2d, "fused", noted_fused), mock.patch.object(nn.ReLU, "forward", noted_relu):
        yield gates


def one_exact_step(theirs: nn.Module, gates: list[Tensor], x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """A step in fp64 whose ReLUs are open where another's were.

    Within a convolution's roundings of ReLU's kink its gradient jumps, which no budget covers. Whether an element of a
    network lies there depends on the device.
    """
    model, left = copy.deepcopy(theirs).double(), iter(gates)
    with mock.patch.object(nn.ReLU, "forward", lambda self, x: x * next(left)):
        found = one_step(model, x.double(), target)
    assert next(left, None) is None
    return found


@pytest.fixture
def on(monkeypatch):
    """Selects a backend for the whole model."""

    def select(backend: str) -> None:
        original = functional.choose_backend
        monkeypatch.setattr(functional, "choose_backend", lambda x, requested=None: original(x, requested or backend))

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield select


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
def test_one_step_of_a_thin_network_in_fp64(training, device, on):
    on("triton")
    models = [model.train(training) for model in thin_resnet.pair(device, torch.float64)]
    x, target = thin_resnet.images(device, torch.float64), torch.tensor([2, 1, 0, 1], device=device)
    found, expected = (one_step(model, x, target) for model in models)
    # Sums of seven layers in another order.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# Interpreted kernels take a quarter of a minute for a whole network.
@pytest.mark.gpu
@pytest.mark.slow
def test_one_step(device, on):
    on("triton")
    ours, theirs = make_pair("cifar", "channels_last", device)
    x, target = make_batch("cifar", "channels_last", device)
    with noted_gates() as gates:
        found = one_step(ours, x, target)
    exact = one_exact_step(theirs, gates, x, target)
    expected, exact_of_expected = [], []
    for any_layout in LAYOUTS.values():
        with noted_gates() as gates:
            model = copy.deepcopy(theirs).to(memory_format=any_layout)
            expected.append(one_step(model, x.contiguous(memory_format=any_layout), target))
        exact_of_expected.append(one_exact_step(theirs, gates, x, target))
    # One number can be right by luck. The loss moves at most twice as far as the farthest logit.
    pairs = list(zip(expected, exact_of_expected, strict=True))
    logits_error = max((result["logits"] - true["logits"]).abs().max() for result, true in pairs)
    for result, true in pairs:
        result["loss"] = (true["loss"] + 2 * logits_error).to(found["loss"].dtype)
    assert found.keys() == exact.keys()
    for name in found:
        if name.endswith("num_batches_tracked"):
            assert found[name] == exact[name]
        else:
            eager, true = ([result[name] for result in results] for results in (expected, exact_of_expected))
            assert_within_budget(name, found[name], eager, exact[name], exact_of_eager=true)


@pytest.mark.gpu
@pytest.mark.slow
def test_one_step_in_bfloat16(device, on):
    """Under autocast; bf16 keeps 8 bits, so only results over many values are compared: all gradients as one vector."""
    on("triton")
    ours, theirs = make_pair("cifar", "channels_last", device)
    x, target = make_batch("cifar", "channels_last", device)
    exact = one_step(copy.deepcopy(theirs).double(), x.double(), target)
    with torch.autocast(device.type, torch.bfloat16):
        found, expected = one_step(ours, x, target), one_step(theirs, x, target)
    for prefix in ("logits", "d ", "layer"):  # the last: running statistics
        names = [name for name in found if name.startswith(prefix) and not name.endswith("num_batches_tracked")]
        vectors = [torch.cat([result[name].flatten() for name in names]) for result in (found, expected, exact)]
        assert_within_budget(prefix, *vectors)


@pytest.mark.parametrize(
    ("stem", "layout", "training"),
    (("cifar", "nchw", True), pytest.param("imagenet", "channels_last", False, marks=pytest.mark.slow)),
)
def test_without_a_gpu_it_is_torchvisions_to_the_bit(stem, layout, training, on):
    """In whatever layout our weights and images are: that of torchvision's network in channels_last."""
    on("aten")
    ours, theirs = (model.train(training) for model in make_pair(stem, layout, torch.device("cpu")))
    x, target = make_batch(stem, layout, torch.device("cpu"))
    theirs, x_of_theirs = theirs.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = one_step(ours, x, target), one_step(theirs, x_of_theirs, target)
        for name in found:
            assert torch.equal(found[name], expected[name]), (name, autocast)


def test_bottlenecks_in_evaluation(on_aten, device):
    torch.manual_seed(0)
    ours = resnet_fast.resnet50(num_classes=10).to(device).eval()
    theirs = torchvision_models.resnet50(num_classes=10).to(device).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    # Contiguous weights let a convolution add up in another order.
    ours, theirs = (model.to(memory_format=torch.channels_last) for model in (ours, theirs))
    x = torch.randn(1, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
