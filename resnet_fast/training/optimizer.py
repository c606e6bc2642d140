"""A recipe's optimizer: its groups of parameters, their learning rates, and its initial state."""

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.training.muon import Muon, split_filters
from resnet_fast.training.network import find_head
from resnet_fast.training.recipes import Recipe

MUON_ITERATIONS = 3  # of Newton-Schulz, as in airbench94_muon; torch.optim.Muon has 5


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer, a fused one, with its state created and zero.

    The learning rate is a tensor, which a CUDA graph reads in each replay. The learning rate of a group is its
    `lr_scale` times the schedule's value. Parameters that need no gradient are left out.
    """
    biases = {id(m.bias) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    if recipe.bn_bias_lr == 1:
        biases = set()
    head = set(map(id, find_head(model)[1].parameters())) if recipe.body_lr != 1 else set()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = trained[0].device
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter in sorted(trained, key=lambda parameter: id(parameter) in biases):  # checkpoints rely on this order
        bias_scale = recipe.bn_bias_lr if id(parameter) in biases else 1.0
        scale = bias_scale * (1.0 if id(parameter) in head else recipe.body_lr)
        decay = recipe.weight_decay / bias_scale
        if (scale, decay) not in groups:
            lr = torch.tensor(0.0, device=device)
            groups[scale, decay] = {"params": [], "lr": lr, "lr_scale": scale, "weight_decay": decay}
        groups[scale, decay]["params"].append(parameter)
    if recipe.optimizer == "muon":
        return _make_muon([*groups.values()], model, recipe)
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam([*groups.values()], fused=True, capturable=device.type == "cuda")
    else:
        nesterov = recipe.nesterov and recipe.momentum > 0  # torch rejects nesterov without momentum
        optimizer = torch.optim.SGD([*groups.values()], lr=0.0, momentum=recipe.momentum, nesterov=nesterov, fused=True)
    # A step with zero gradients at rate zero creates the state, which must exist before a graph is recorded. In a step
    # that overflows, fused SGD would allocate the momentum and leave it uninitialized.
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    return optimizer


def _make_muon(groups: list[dict[str, Any]], model: nn.Module, recipe: Recipe) -> Muon:
    """Split Muon's weights off the groups, with their own learning rate and momentum, and return the optimizer."""
    filters = {id(weight) for weight in split_filters(model)[0]}
    split = []
    for group in groups:
        for use_muon in (False, True):
            own = [weight for weight in group["params"] if (id(weight) in filters) == use_muon]
            settings = {**group, "params": own, "use_muon": use_muon, "lr": group["lr"].clone()}
            if use_muon:
                settings["lr_scale"] = group["lr_scale"] * recipe.muon_lr / recipe.lr
                settings |= {"momentum": recipe.muon_momentum, "n_iterations": MUON_ITERATIONS}
            split += [settings] if own else []
    optimizer = Muon(split, lr=0.0, momentum=recipe.momentum, nesterov=recipe.nesterov, rescale=recipe.rescale_filters)
    for group in split:
        for weight in group["params"]:
            optimizer.momentum_of(weight)
    return optimizer
