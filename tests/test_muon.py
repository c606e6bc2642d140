"""Muon computes the same as torch.optim.Muon on flattened weights, batched by shape; other parameters use SGD."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from thin_resnet import thin_resnet
from tiny_run import equal
from torch import Tensor, nn

from resnet_fast.models import resnet
from resnet_fast.training import RECIPES, TrainingStep
from resnet_fast.training import muon as muon_module
from resnet_fast.training.muon import Muon, orthogonalize, split_filters
from resnet_fast.training.optimizer import make_optimizer

SHAPES = [(8, 4, 3, 3), (8, 4, 3, 3), (16, 3, 1, 1), (5, 7, 3, 3), (6, 10), (8, 4, 3, 3), (4, 6, 3)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def make_weights(layout: torch.memory_format = torch.contiguous_format, dtype: torch.dtype = torch.float32) -> list:
    generator = torch.Generator().manual_seed(0)
    weights = []
    for shape in SHAPES:
        weight = torch.randn(shape, generator=generator, dtype=dtype)
        weights.append(nn.Parameter(weight.to(memory_format=layout) if len(shape) == 4 else weight))
    return weights


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, weights: list[Tensor], n_steps: int = 4) -> None:
    for step in range(n_steps):
        for weight, gradient in zip(weights, gradients(step, weights[0].dtype), strict=True):
            # The gradient has the weight's layout, as autograd's has.
            weight.grad = torch.empty_like(weight).copy_(gradient.view(weight.shape))
        optimizer.step()


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a.flatten(1), b.flatten(1), rtol=tolerance, atol=tolerance) for a, b in pairs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("tensor_lr", [True, False])
def test_it_is_torchs_on_flattened_weights(
    layout: torch.memory_format, nesterov: bool, tensor_lr: bool, monkeypatch: pytest.MonkeyPatch
):
    settings = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    weights, flat = make_weights(layout), [nn.Parameter(weight.detach().flatten(1)) for weight in make_weights()]
    run(Muon(weights, lr=torch.tensor(0.1) if tensor_lr else 0.1, **settings), weights)
    # torch's iterates in bf16 wherever it is: here in fp32, on a copy, because it divides in place.
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.float().clone())
    run(torch.optim.Muon(flat, lr=0.1, **settings), flat)
    assert close(weights, flat, 1e-5)
    assert not close(weights, make_weights(), 0.1)


def test_it_is_torchs_in_bf16(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU. A product of bf16 has 8 bits, and the iteration multiplies a rounding by up to 3.4 five times."""
    monkeypatch.setattr(muon_module, "_iteration_type", lambda matrices: torch.bfloat16)
    weights, flat = make_weights(), [nn.Parameter(weight.detach().flatten(1)) for weight in make_weights()]
    for one, kind in ((weights, Muon), (flat, torch.optim.Muon)):
        run(kind(one, lr=0.1, weight_decay=0.1), one, n_steps=1)
    assert close(weights, flat, 0.1 * 2**-5)


def formula(weights: list[Tensor], lr: float, momentum: float, n_iterations: int) -> list[Tensor]:
    """Jordan's airbench94_muon, written down: filters to the norm √C_out, then a step along the orthogonalized."""
    averages = [torch.zeros_like(weight) for weight in weights]
    weights = [weight.clone() for weight in weights]
    for step in range(4):
        for i, gradient in enumerate(gradients(step, weights[0].dtype)):
            averages[i] = momentum * averages[i] + gradient
            update = (gradient + momentum * averages[i]).flatten(1)
            # The iteration acts on singular values alone.
            u, s, v = torch.linalg.svd(update, full_matrices=False)
            s = s / s.norm()
            for _ in range(n_iterations):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            update = (u * s) @ v
            weight = weights[i] * len(weights[i]) ** 0.5 / weights[i].norm()
            scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
            weights[i] = weight - lr * scale * update.view(weight.shape)
    return weights


def test_rescaled_filters_are_airbenchs():
    weights = make_weights(dtype=torch.float64)
    expected = formula([weight.detach() for weight in weights], 0.24, 0.6, 3)
    run(Muon(weights, lr=0.24, momentum=0.6, n_iterations=3, rescale=True), weights)
    assert close(weights, expected, 1e-10)


def test_singular_values_come_near_1():
    matrices = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    for given in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalize(given, 5))
        assert values.min() > 0.5 and values.max() < 1.3


def test_no_gradient_at_all_moves_nothing():
    weights = make_weights()
    optimizer = Muon(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, make_weights(), strict=True))


def test_other_groups_are_sgds():
    def make() -> list[nn.Parameter]:
        return [nn.Parameter(torch.linspace(-1, 1, 6)), nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))]

    own, torchs = make(), make()
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    optimizers = Muon(own, **settings, use_muon=False), torch.optim.SGD(torchs, **settings, fused=True)
    for step in range(3):
        for optimizer, weights in zip(optimizers, (own, torchs), strict=True):
            for weight in weights:
                weight.grad = torch.full_like(weight, 0.5 - step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(own, torchs, strict=True))


def test_the_stem_batch_norms_and_the_head_stay_on_sgd():
    model = thin_resnet(resnet)
    filters, others = split_filters(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("conv" in names[id(p)] or "downsample.0" in names[id(p)] for p in filters)
    left = {names[id(p)] for p in others}
    assert {"conv1.weight", "bn1.weight", "bn1.bias", "fc.weight", "fc.bias"} <= left
    assert not any(p.ndim == 4 and names[id(p)] != "conv1.weight" for p in others)
    recipe = replace(RECIPES["fast94"], optimizer="muon", bn_bias_lr=64.0, muon_lr=0.4, weight_decay=0.064)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, replace(recipe, rescale_filters=True))
    assert equal(before, model.state_dict()) and len(optimizer.state) == len(list(model.parameters()))
    groups = optimizer.param_groups
    assert [(g["use_muon"], g["lr_scale"], g["weight_decay"], g["momentum"]) for g in groups] == [
        (False, 1.0, 0.064, 0.9),
        (True, 2.0, 0.064, 0.6),
        (False, 64.0, 0.001, 0.9),
    ]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in filters}


def test_its_state_survives_saving():
    weights, resumed = make_weights(), make_weights()
    optimizer, other = Muon(weights, lr=0.1), Muon(resumed, lr=0.1)
    run(optimizer, weights)
    with torch.no_grad():
        for target, value in zip(resumed, weights, strict=True):
            target.copy_(value)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, of in ((optimizer, weights), (other, resumed)):
        run(one, of)
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_overflows_changes_nothing_and_a_loss_scale_cancels(bad: float):
    plain, scaled = make_weights(), make_weights()
    optimizers = Muon(plain, lr=0.1, rescale=True), Muon(scaled, lr=0.1, rescale=True)
    run(optimizers[0], plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    for step in range(4):
        before = copy.deepcopy([scaled, optimizers[1].state_dict()["state"]])
        for value in (bad, None):
            for weight, gradient in zip(scaled, gradients(step), strict=True):
                weight.grad = gradient * scaler.get_scale()
            if value is not None:
                scaled[1].grad[0, 0] = value
            scaler.step(optimizers[1])
            scaler.update()
            if value is not None and step > 0:
                assert equal([scaled, optimizers[1].state_dict()["state"]], before)
    # Powers of two: only the gradients' range differs.
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1}, "lr must be a finite number, 0 or more, got -1"),
        ({"lr": torch.zeros(2)}, r"lr must be one number, got a tensor of \[2\]"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number, 0 or more, got -0.1"),
        ({"n_iterations": 100}, "n_iterations must be below 100, got 100"),
        ({"nesterov": 1}, "nesterov must be .*bool.*int"),
    ],
)
def test_a_setting_that_breaks_its_rule_is_named(settings: dict[str, Any], message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        Muon(make_weights(), **settings)


def test_a_bias_is_not_for_muon():
    with pytest.raises(ValueError, match=r"Muon's weights must have at least 2 dimensions, got \[4\]"):
        Muon([nn.Parameter(torch.zeros(4))])


class OneConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)


def test_a_network_without_convolutions_is_refused():
    from test_graphed_step import AUGMENTATION

    message = "optimizer muon needs a convolution to train after the first one, OneConvolution has none"
    with pytest.raises(ValueError, match=message):
        TrainingStep(OneConvolution(), replace(RECIPES["fast94"], optimizer="muon"), AUGMENTATION, 1)
