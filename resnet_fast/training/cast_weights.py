"""Cast all weights of a network to bf16 or fp16 together: one launch forward and one backward for all of them.

Autocast launches one cast for each weight when a layer first reads it, and one for each weight's gradient. It does not
cast weights that already have its type, so the network runs on copies that are cast beforehand.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast.models.blocks import has_own_hook

# Layers of these packages use their weights only under autocast; other code may need them in fp32.
SOURCES = ("torch.nn.modules.", "torchvision.models.", "resnet_fast.")


class Shadow(NamedTuple):
    """A weight, its copy in autocast's type, and the modules' dictionaries of parameters that hold it, by name."""

    weight: nn.Parameter
    copy: Tensor
    places: list[tuple[dict[str, Any], str]]


class CastWeights:
    """Runs a model under autocast, with the weights of its convolutions and linear layers cast together.

    Outputs and gradients of the fp32 parameters are bit-identical to those of `model(x)`. The model is changed during a
    call only. With hooks registered, the call is `model(x)`.

    Args:
        model: the network, on its device. Change its parameters in place; do not replace them or its layers.
        dtype: the type of autocast, torch.bfloat16 or torch.float16.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.modules = model, tuple(model.modules())
        shadows: dict[nn.Parameter, Shadow] = {}  # a shared weight is cast once
        for module in self.modules:
            if type(module) not in (nn.Conv2d, nn.Linear):
                continue
            for name, weight in module._parameters.items():
                if type(weight) is nn.Parameter and weight.dtype == torch.float32:
                    copy = torch.empty_like(weight, dtype=dtype, requires_grad=False)
                    shadow = shadows.setdefault(weight, Shadow(weight, copy, []))
                    shadow.places.append((module._parameters, name))
        self.shadows = list(shadows.values())

    def __call__(self, x: Tensor) -> Tensor:
        shadows = [shadow for shadow in self.shadows if shadow.weight.requires_grad]
        if not shadows or nn.modules.module._has_any_global_hook() or any(map(has_own_hook, self.modules)):
            return self.model(x)
        casts = _Cast.apply([shadow.copy for shadow in shadows], *(shadow.weight for shadow in shadows))
        try:
            for shadow, cast in zip(shadows, casts, strict=True):  # type: ignore[arg-type]
                for parameters, name in shadow.places:
                    parameters[name] = cast
            return self.model(x)
        finally:
            for shadow in shadows:
                for parameters, name in shadow.places:
                    parameters[name] = shadow.weight


def cast_weights(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the model's forward with its weights cast together, or the model if it has layers of other packages."""
    is_known = all(type(module).__module__.startswith(SOURCES) for module in model.modules())
    return CastWeights(model, dtype) if is_known else model


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies: list[Tensor], *weights: Tensor):
        torch._foreach_copy_(copies, weights)  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):  # type: ignore[override]
        given = [gradient for gradient in gradients if gradient is not None]
        converted = [torch.empty_like(gradient, dtype=torch.float32) for gradient in given]
        torch._foreach_copy_(converted, given)  # type: ignore[attr-defined]
        rest = iter(converted)
        return None, *(None if gradient is None else next(rest) for gradient in gradients)
