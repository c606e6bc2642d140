"""A training step with a penalty on the gradient of the loss (WGAN-GP, R1) is torchvision's, in a whole ResNet.

The network forks at every block, so the gradients of two handles are differentiated once more. Gulrajani et al. 2017,
arXiv:1704.00028, equation 3.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from fused_op import LAYOUTS, Operands, magnitudes
from thin_resnet import images, pair
from torch import Tensor, nn

from resnet_fast.functional import BatchNormArgs


def make_pair(layout: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    ours, theirs = pair(device)
    assert len(ours._blocks_to_fuse(torch.empty(1, 3, 8, 8))) == 3  # else nothing of ours is tested
    return tuple(model.to(memory_format=LAYOUTS[layout]) for model in (ours, theirs))


def make_batch(layout: str, device: torch.device) -> tuple[Tensor, Tensor]:
    return images(device).contiguous(memory_format=LAYOUTS[layout]), torch.tensor([2, 1, 0, 1], device=device)


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


def magnitudes_of_statistics(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """`magnitudes` of every running statistic that a forward updates."""
    found = {}

    def add(name: str, norm: nn.BatchNorm2d, x: Tensor) -> None:
        arguments = BatchNormArgs(norm.running_mean, norm.running_var, None, None, True, norm.momentum, norm.eps)
        of_one = magnitudes(Operands(x, x, [arguments, arguments], x), "none")
        found.update({f"{name}.{of}": of_one[of] for of in ("running_mean", "running_var")})

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda norm, inputs, name=name: add(name, norm, inputs[0].detach()))
    model(x)
    return found


@pytest.fixture(autouse=True)
def exact_convolutions():
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@pytest.mark.parametrize(("layout", "training"), (("channels_last", True), ("nchw", False)))
def test_a_step_in_fp64(layout, training, device):
    models = [model.double().train(training) for model in make_pair(layout, device)]
    x, target = make_batch(layout, device)
    found, expected = (step(model, x.double(), target) for model in models)
    assert found.keys() == expected.keys()
    for name in found:
        # 2^12 roundings: a second derivative through 8 batch norms, the last ones of 64 values
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12 * max(1, scale), msg=name)


@pytest.mark.slow
def test_a_step_in_fp32(device):
    ours, theirs = make_pair("channels_last", device)
    x, target = make_batch("channels_last", device)
    exact = step(copy.deepcopy(theirs).double(), x.double(), target)
    expected = [
        step(copy.deepcopy(theirs).to(memory_format=layout), x.contiguous(memory_format=layout), target)
        for layout in LAYOUTS.values()
    ]
    added = magnitudes_of_statistics(copy.deepcopy(theirs).double(), x.double())
    found = step(ours, x, target)
    assert added.keys() < found.keys()
    # Together: of sixty tensors, one or the other is rounded luckily in eager.
    kinds = {
        "dx": ["dx"],
        "gradients": [name for name in found if name.startswith("d ")],
        "weights": [name for name, _ in ours.named_parameters()],
        "running statistics": list(added),
    }
    for kind, names in kinds.items():
        vectors = [torch.cat([result[name].flatten() for name in names]) for result in (found, *expected, exact)]
        terms = torch.cat([added[name].flatten() for name in names]) if kind == "running statistics" else None
        assert_within_budget(kind, vectors[0], vectors[1:-1], vectors[-1], terms)
    assert all(found[name] == 1 for name in found if name.endswith("num_batches_tracked"))


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
        last = model.layer2[0]
        wanted = [model.layer1[1].bn2.weight, last.bn2.weight, last.downsample[1].bias, last.bn1.bias]
        for parameter in wanted:
            parameter.requires_grad_()
        loss = F.cross_entropy(model(x.double()), target)
        gradients = torch.autograd.grad(loss, wanted[:3], create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
        found.append([*gradients, *(parameter.grad for parameter in wanted)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)  # fp64, sums in two orders
