"""Each input gets eager's gradient if it requires one, else none, whatever the others require, in every grad mode."""

import pytest
import torch
import torch.nn.functional as F
from thin_resnet import images, pair
from torch import nn

from resnet_fast import FusedBatchNorm2d
from resnet_fast.functional import BatchNormArgs, batch_norm_add_relu

NAMES = ("x", "residual", "weight", "bias", "residual_weight", "residual_bias")
WANTED = {
    "all but weight": set(NAMES) - {"weight"},
    "x alone": {"x"},
    "weight alone": {"weight"},
    "the residual's weight alone": {"residual_weight"},
    "parameters": {"weight", "bias", "residual_weight", "residual_bias"},
}


def make_leaves(device, wanted) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, 4, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    tensors += [0.5 + torch.rand(3, generator=generator, dtype=torch.float64) for _ in range(4)]
    return {name: tensor.to(device).requires_grad_(name in wanted) for name, tensor in zip(NAMES, tensors, strict=True)}


def ours(leaves, join, training, backend):
    running = (None, None) if training else (leaves["weight"].detach(), leaves["bias"].detach())
    norm = BatchNormArgs(*running, leaves["weight"], leaves["bias"], training)
    residual_norm = norm._replace(weight=leaves["residual_weight"], bias=leaves["residual_bias"])
    return batch_norm_add_relu(
        leaves["x"],
        *norm,
        residual=None if join == "none" else leaves["residual"],
        residual_norm=residual_norm if join == "bn" else None,
        backend=backend,
    )


def eager(leaves, join, training, backend=None):
    running = (None, None) if training else (leaves["weight"].detach(), leaves["bias"].detach())
    y = F.batch_norm(leaves["x"], *running, leaves["weight"], leaves["bias"], training)
    residual = leaves["residual"]
    if join == "bn":
        residual = F.batch_norm(residual, *running, leaves["residual_weight"], leaves["residual_bias"], training)
    return F.relu(y if join == "none" else y + residual)


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize(("join", "backend"), (("add", "triton"), ("bn", "triton"), ("bn", "aten")))
def test_gradients_of_the_wanted(wanted, join, backend, device):
    for training in (True, False):
        outcomes = []
        for function in (ours, eager):
            leaves = make_leaves(device, WANTED[wanted])
            y = function(leaves, join, training, backend)
            if y.requires_grad:
                y.square().sum().backward()
            outcomes.append((y.requires_grad, {name: leaf.grad for name, leaf in leaves.items()}))
        (found_flag, found), (expected_flag, expected) = outcomes
        assert found_flag == expected_flag
        for name in NAMES:
            assert (found[name] is None) == (expected[name] is None), name
            if found[name] is not None:  # fp64, sums of 16 terms in another order
                torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("join", "backend"), (("add", "triton"), ("bn", "triton"), ("bn", "aten")))
def test_one_tensor_is_input_and_residual(join, backend, device):
    for training in (True, False):
        found, expected = [], []
        for function, gradients in ((ours, found), (eager, expected)):
            leaves = make_leaves(device, NAMES)
            leaves["residual"] = leaves["x"]
            y = function(leaves, join, training, backend)
            y.square().sum().backward()
            gradients += [y.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert len(found) == (7 if join == "bn" else 5)  # y, x (twice) and the parameters


@pytest.mark.parametrize("backend", ("triton", "aten"))
def test_inputs_stay_as_they_are(backend, device):
    """Also where input and residual are one tensor."""
    leaves = make_leaves(device, ())
    before = {name: leaf.clone() for name, leaf in leaves.items()}
    leaves["residual"] = leaves["x"]
    before["residual"] = before["x"]
    for join in ("none", "add", "bn"):
        ours(leaves, join, True, backend)
    for name, leaf in leaves.items():
        assert torch.equal(leaf, before[name]), name


@pytest.mark.parametrize("backend", ("triton", "aten"))
def test_an_input_changed_before_the_backward_is_noticed(backend, device):
    leaves = make_leaves(device, {"weight"})
    y = ours(leaves, "add", True, backend)
    leaves["x"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(("mode", "training"), ((torch.no_grad, True), (torch.inference_mode, False)))
def test_modes_without_gradients(training, mode, either_backend, device):
    """The numbers of the grad mode, the statistics updated as ever, and nothing that could be differentiated."""
    x, residual = torch.randn(2, 2, 4, 5, 3, device=device)
    outcomes = []
    for context in (torch.enable_grad, mode):
        module = FusedBatchNorm2d(4, relu=True).to(device).train(training)
        with context():
            y = module(x, residual)
        outcomes.append((y, *module.buffers()))
    assert outcomes[0][0].requires_grad and not outcomes[1][0].requires_grad
    assert outcomes[1][0].is_inference() == (mode is torch.inference_mode)
    for plain, without in zip(*outcomes, strict=True):
        assert torch.equal(plain, without)


def test_an_inference_tensor_is_not_saved_for_a_backward(either_backend, device):
    with torch.inference_mode():
        x = torch.randn(2, 4, 3, 3, device=device)
    for module in (FusedBatchNorm2d(4), nn.BatchNorm2d(4)):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            module.to(device)(x)


def freeze_and_evaluate_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False).eval()


def freeze_convolutions(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)


def freeze_the_first_stage(model):
    for stage in (model.conv1, model.bn1, model.layer1):
        stage.requires_grad_(False)


def freeze_weights_of_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(False)


@pytest.mark.parametrize(
    "freeze",
    (freeze_and_evaluate_norms, freeze_convolutions, freeze_the_first_stage, freeze_weights_of_norms),
)
def test_frozen_layers_of_a_network(freeze, device):
    models = pair(device, torch.float64)
    for model in models:
        freeze(model)
        model(images(device, torch.float64)).square().sum().backward()
    ours, theirs = models
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None), name
        if found.grad is not None:  # fp64: seven layers' sums in another order
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-10, msg=name)
    for (name, found), expected in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)
