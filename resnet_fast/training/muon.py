"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum SGD with orthogonalized updates.

For a weight as a matrix W, [C_out, C_in·kh·kw], with gradient G, momentum buffer B, momentum m, learning rate r and
weight decay d, one step is

    B = m·B + (1 - m)·G                      U = m·B + (1 - m)·G with Nesterov's momentum, else B
    X = U / |U|, then n times                A = X·Xᵀ,  X = a·X + (b·A + c·A²)·X
    W = W·√C_out / |W|                       with `rescale`
    W = (1 - r·d)·W - r·√max(1, C_out / (C_in·kh·kw))·X

|.| is the Frobenius norm. The iteration (Newton-Schulz) brings all singular values of X near 1. Without `rescale` this
is torch.optim.Muon, which accepts matrices only; `rescale` comes from airbench94_muon
(https://github.com/KellerJordan/cifar10-airbench).

Weights of the same shape form one batch, with a few matrix products for all of them. The iteration runs in bf16 on a
GPU of compute capability 8.0 or higher, else in fp32 or the weights' wider type. All else uses the weights' type.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from resnet_fast.common.checks import check_integer, check_type, is_number, shown

A, B, C = 3.4445, -4.7750, 2.0315  # a, b, c of the iteration, for a steep slope at 0 (Jordan et al. 2024)
EPS = 1e-7  # lower bound of a norm that is divided by


class Muon(torch.optim.Optimizer):
    """Muon for groups with `use_muon`, SGD in one fused pass for the others.

        filters, others = split_filters(model)
        Muon([{"params": filters, "lr": 0.12}, {"params": others, "lr": 0.2, "momentum": 0.9, "use_muon": False}])

    Args:
        params: weights, or groups of them. Muon's weights have at least two dimensions, of which the first is C_out.
        lr: the learning rate: a number, or a tensor on the weights' device, which a CUDA graph reads in each replay.
        momentum: in [0, 1).
        nesterov: whether to use Nesterov momentum.
        weight_decay: in Muon, the share of a weight that is subtracted, times lr. SGD adds it to the gradient.
        n_iterations: number of Newton-Schulz iterations.
        rescale: whether to scale a weight to norm √C_out before each step. Use it only for layers before a batch norm,
            whose output does not depend on the weight's scale.
        use_muon: whether Muon trains the group.

    Raises:
        TypeError, ValueError: a setting breaks its rule, or one of Muon's weights has fewer than two dimensions.

    It never waits for the GPU. Like fused optimizers, it skips steps whose gradients overflow in fp16 (GradScaler).

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Muon's equations are in this module's docstring.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf instead of waiting for the GPU

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        n_iterations: int = 5,
        rescale: bool = False,
        use_muon: bool = True,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, settings | {"n_iterations": n_iterations, "rescale": rescale, "use_muon": use_muon})
        for group in self.param_groups:
            _check_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Run one step on the weights that have a gradient; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # GradScaler sets these, in fp16 only.
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            update = self._muon if group["use_muon"] else self._sgd
            if weights:
                update(group, weights, scale, overflow)
        return loss

    def momentum_of(self, weight: Tensor) -> Tensor:
        """Return the momentum buffer of a weight, initially 0; it must exist before a CUDA graph is recorded."""
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]

    def _sgd(self, group: dict[str, Any], weights: list[Tensor], scale: Tensor | None, overflow: Tensor | None) -> None:
        sgd(
            weights,
            [cast(Tensor, weight.grad) for weight in weights],
            [*map(self.momentum_of, weights)],
            fused=True,
            grad_scale=scale,
            found_inf=overflow,
            **{name: group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")},
            dampening=0.0,
            maximize=False,
        )

    def _muon(
        self, group: dict[str, Any], weights: list[Tensor], scale: Tensor | None, overflow: Tensor | None
    ) -> None:
        lr, momentum, foreach = group["lr"], group["momentum"], cast(Any, torch)
        for same in _by_shape(weights):
            buffers = [*map(self.momentum_of, same)]
            gradients = _stacked([cast(Tensor, weight.grad) for weight in same])
            if scale is not None:
                gradients = gradients / scale
            old_average, old = _stacked(buffers), _stacked(same)
            average = old_average.lerp(gradients, 1 - momentum)
            update = orthogonalize(
                gradients.lerp(average, momentum) if group["nesterov"] else average, group["n_iterations"]
            )
            rows, columns = old.shape[1:]
            new = old * (math.sqrt(rows) / _norms(old)) if group["rescale"] else old
            new = new * (1 - lr * group["weight_decay"]) - update * (lr * math.sqrt(max(1, rows / columns)))
            if overflow is not None:
                average, new = (
                    torch.where(overflow > 0, before, after) for before, after in ((old_average, average), (old, new))
                )
            for targets, values in ((buffers, average), (same, new)):
                shaped = [_shaped(value, target) for value, target in zip(values, targets, strict=True)]
                foreach._foreach_copy_(targets, shaped)


def orthogonalize(matrices: Tensor, n_iterations: int) -> Tensor:
    """Return approximately U·Vᵀ for each matrix U·S·Vᵀ: after 5 iterations, its singular values are about 0.7 to 1.2.

    Args:
        matrices: [N, rows, columns], floating point.
        n_iterations: number of Newton-Schulz iterations; with fewer, small singular values stay small.

    Returns:
        [N, rows, columns], in the type of `matrices`.
    """
    x = matrices.to(_iteration_type(matrices))
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:  # so that X·Xᵀ is the smaller product
        x = x.mT
    x = x / _norms(x)
    for _ in range(n_iterations):
        product = x @ x.mT
        polynomial = torch.baddbmm(product, product, product, beta=B, alpha=C)
        x = torch.baddbmm(x, polynomial, x, beta=A)
    return (x.mT if is_tall else x).to(matrices.dtype)


def split_filters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights that Muon trains, and all other parameters, each in the model's order.

    Muon trains the weights of all convolutions except the first, which reads the images. Parameters that need no
    gradient are left out.

    Raises:
        ValueError: no convolution except the first is trained.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    ids = {id(conv.weight) for conv in convolutions[1:] if conv.weight.requires_grad}
    if not ids:
        raise ValueError(
            f"optimizer muon needs a convolution to train after the first one, {type(model).__name__} has none"
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in trained if id(p) in ids], [p for p in trained if id(p) not in ids]


def _check_group(group: dict[str, Any]) -> None:
    """Raise TypeError or ValueError if a setting of the group breaks its rule; torch checks the weights."""
    for name in ("nesterov", "rescale", "use_muon"):
        check_type(name, group[name], bool)
    check_integer("n_iterations", group["n_iterations"], 0, 100)
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must be one number, got a tensor of {list(lr.shape)}")
    elif not is_number(lr) or lr < 0:
        raise ValueError(f"lr must be a finite number, 0 or more, got {shown(lr)}")
    for name, most in (("momentum", 1.0), ("weight_decay", math.inf)):
        if not is_number(group[name]) or not 0 <= group[name] < most:
            rule = "in [0, 1)" if most == 1 else "a finite number, 0 or more"
            raise ValueError(f"{name} must be {rule}, got {shown(group[name])}")
    if group["use_muon"]:
        for weight in group["params"]:
            if weight.ndim < 2:
                raise ValueError(f"Muon's weights must have at least 2 dimensions, got {list(weight.shape)}")
    elif group["nesterov"] and group["momentum"] == 0:
        group["nesterov"] = False  # no effect without momentum, and SGD refuses the combination


def _by_shape(weights: list[Tensor]) -> list[list[Tensor]]:
    shapes: dict[Any, list[Tensor]] = {}
    for weight in weights:
        shapes.setdefault((weight.shape, weight.dtype, weight.device), []).append(weight)
    return [*shapes.values()]


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Return [N, C_out, kh·kw·C_in], as in channels_last memory; Muon does not depend on the order of columns."""
    return torch.stack([tensor.movedim(1, -1).flatten(1) for tensor in tensors])


def _shaped(matrix: Tensor, like: Tensor) -> Tensor:
    """Return a matrix from `_stacked` in the shape of its weight `like`."""
    return matrix.view(like.movedim(1, -1).shape).movedim(-1, 1)


def _norms(matrices: Tensor) -> Tensor:
    return matrices.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)


def _iteration_type(matrices: Tensor) -> torch.dtype:
    device = matrices.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.bfloat16
    return torch.promote_types(matrices.dtype, torch.float32)
