"""A training step with a penalty on the gradient of the loss (WGAN-GP, R1) is torchvision's, in a whole ResNet.

The network forks at every block, so the gradients of two handles are differentiated once more. Gulrajani et al. 2017,
arXiv:1704.00028, equation 3.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from fused_op import LAYOUTS
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from resnet_fast.models import resnet


def narrow_resnet(module) -> nn.Module:
    """The ResNet of `module` with every kind of block, narrow enough for the interpreter, weights of its own."""
    torch.manual_seed(0)
    model = module.ResNet(module.BasicBlock, [1, 1, 1, 1], num_classes=5)
    model.inplanes = 8
    model.conv1, model.bn1, model.maxpool = nn.Conv2d(3, 8, 3, padding=1, bias=False), type(model.bn1)(8), nn.Identity()
    for stage, (width, n_blocks) in enumerate(((8, 2), (12, 1), (16, 1), (20, 1))):
        layer = model._make_layer(module.BasicBlock, width, n_blocks, stride=min(2, stage + 1))
        setattr(model, f"layer{stage + 1}", layer)
    model.fc = nn.Linear(20, 5)
    with torch.no_grad():  # not the initial ones and zeros, which hide errors
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def make_pair(layout: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    ours, theirs = narrow_resnet(resnet), narrow_resnet(torchvision_resnet)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert len(ours._blocks_to_fuse(torch.empty(1, 3, 8, 8))) == 5  # else nothing of ours is tested
    return tuple(model.to(device, memory_format=LAYOUTS[layout]) for model in (ours, theirs))


def make_batch(layout: str, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return x.to(device).contiguous(memory_format=LAYOUTS[layout]), torch.tensor([3, 1, 4, 1], device=device)


def penalized_loss(model: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """loss + 10·(|d loss/d x| - 1)², and d loss/d x."""
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), target)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + 10 * (dx.flatten(1).norm(dim=1) - 1).square().mean(), dx


def step(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Every gradient, and the updated weights and buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loss, dx = penalized_loss(model, x, target)
    loss.backward()
    optimizer.step()
    gradients = {f"d {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"dx": dx.detach()} | gradients | model.state_dict()


@pytest.fixture(autouse=True)
def exact_convolutions():
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("training", (True, False), ids=("training", "frozen"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_in_fp64(layout, training, device):
    models = [model.double().train(training) for model in make_pair(layout, device)]
    x, target = make_batch(layout, device)
    found, expected = (step(model, x.double(), target) for model in models)
    assert found.keys() == expected.keys()
    for name in found:
        # 2^12 roundings: a second derivative through 14 batch norms, the last ones of 16 values
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12 * max(1, scale), msg=name)


def test_a_step_in_fp32(device):
    ours, theirs = make_pair("channels_last", device)
    x, target = make_batch("channels_last", device)
    exact = step(copy.deepcopy(theirs).double(), x.double(), target)
    expected = [
        step(copy.deepcopy(theirs).to(memory_format=layout), x.contiguous(memory_format=layout), target)
        for layout in LAYOUTS.values()
    ]
    found = step(ours, x, target)
    for name in found:
        if name.endswith("num_batches_tracked"):
            assert found[name] == 1
        else:
            assert_within_budget(name, found[name], [result[name] for result in expected], exact[name])


def test_the_running_statistics_are_updated_once(device):
    """By the forward: not by the gradients' recomputation, nor by a second backward through the same graph."""
    ours, _ = make_pair("channels_last", device)
    x, target = make_batch("channels_last", device)
    after_forward = copy.deepcopy(ours)
    after_forward(x)
    loss, _ = penalized_loss(ours, x, target)
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in ours.parameters()]
    loss.backward()
    for name, tensor in after_forward.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    for parameter, gradient in zip(ours.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)


def test_a_penalty_on_the_gradient_of_some_weights(device):
    """autograd.grad of some of the inputs of an operation, as when part of a network is frozen."""
    ours, theirs = (model.double() for model in make_pair("channels_last", device))
    x, target = make_batch("channels_last", device)
    found = []
    for model in (ours, theirs):
        model.requires_grad_(False)
        wanted = [model.layer2[0].bn2.weight, model.layer2[0].downsample[1].bias, model.layer3[0].bn1.bias]
        for parameter in wanted:
            parameter.requires_grad_()
        loss = F.cross_entropy(model(x.double()), target)
        gradients = torch.autograd.grad(loss, wanted[:2], create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
        found.append([*gradients, *(parameter.grad for parameter in wanted)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)  # fp64, sums in two orders
