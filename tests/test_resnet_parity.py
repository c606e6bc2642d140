"""resnet18 computes what torchvision's computes: logits, loss, every gradient and every buffer."""

import copy

import pytest
import thin_resnet
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from fused_op import LAYOUTS
from torch import nn
from torchvision import models as torchvision_models

import resnet_fast
from resnet_fast import functional

# Where an element lies within a convolution's roundings of ReLU's kink, its gradient jumps, which no budget covers.
# With one thread none of these cases has such an element.
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
    found = one_step(ours, x, target)
    exact = one_step(copy.deepcopy(theirs).double(), x.double(), target)
    expected = [
        one_step(copy.deepcopy(theirs).to(memory_format=any_layout), x.contiguous(memory_format=any_layout), target)
        for any_layout in LAYOUTS.values()
    ]
    # One number can be right by luck. The loss moves at most twice as far as the farthest logit.
    logits_error = max((result["logits"] - exact["logits"]).abs().max() for result in expected)
    for result in expected:
        result["loss"] = (exact["loss"] + 2 * logits_error).to(found["loss"].dtype)
    assert found.keys() == exact.keys()
    for name in found:
        if name.endswith("num_batches_tracked"):
            assert found[name] == exact[name]
        else:
            assert_within_budget(name, found[name], [result[name] for result in expected], exact[name])


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
