"""Refuse to profile wrong results: check the gradients in fp64, then loss and logits of the first step.

The first step runs in the precision that is profiled. There, rounding to bf16 changes the gradients of a network with
random weights by 0.3 (ResNet-18) to 1.5 (ResNet-152) of their size, so they are checked in fp64. The loss is about
log(10) for any network with random weights, so the logits are checked as well.
"""

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.ops.backend import INTERPRETER, is_interpreted
from resnet_fast.profiling.recording import ProfileError
from resnet_fast.training.config import TrainConfig

# fp64 needs four times the memory of bf16; with few images it fits wherever the step fits.
N_IMAGES = 16
# Of all gradients and running statistics together, in L2 norm. A different order of summation in fp64 changes them by
# 4e-15 (ResNet-18) to 2e-12 (ResNet-152); a block of ResNet-18 that loses its shortcut's gradient, by 0.2.
MAX_DIFFERENCE = 1e-6


def refuse_interpreter() -> None:
    """Raise ProfileError if Triton's kernels are interpreted."""
    if is_interpreted():
        raise ProfileError(
            "interpreted kernels are not timed: Triton's interpreter is thousands of times slower than a GPU; "
            f"unset {INTERPRETER}"
        )


def check_gradients(models: Mapping[str, nn.Module], images: Tensor, labels: Tensor) -> None:
    """Compare gradients and running statistics of the other models with the first, on N_IMAGES images in fp64.

    Raises:
        ProfileError: they differ by more than MAX_DIFFERENCE of their size.
    """
    (_, expected), *others = models.items()
    for name, model in others:
        difference = gradient_difference(model, expected, images[:N_IMAGES], labels[:N_IMAGES])
        if not difference <= MAX_DIFFERENCE:  # not "difference > MAX_DIFFERENCE", which NaN would pass
            raise ProfileError(
                f"{name} is wrong and is not profiled: in fp64 its gradients and running statistics must differ by at "
                f"most {MAX_DIFFERENCE:g} of their size, got {difference:.3g}"
            )


def gradient_difference(model: nn.Module, expected: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the relative L2 difference of two models' gradients and running statistics after a step in fp64."""
    ours, theirs = (_gradients(module, images, labels) for module in (model, expected))
    return _norm([our - their for our, their in zip(ours, theirs, strict=True)]) / _norm(theirs)


def exact_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of all images in fp64 and training mode, without keeping activations."""
    with torch.no_grad():
        return _exact(model)(images.double().contiguous())


def check_first_step(
    first: Mapping[str, tuple[Tensor, Tensor]],
    exact: Tensor,
    labels: Tensor,
    models: Mapping[str, nn.Module],
    config: TrainConfig,
) -> None:
    """Check loss and logits: error against fp64 <= 2 x the first model's + sqrt(layers) roundings, in L2 norm.

    The first model's error is the cost of the precision. The second term covers a first model that happens to be exact:
    layers round independently of each other, so their errors add up as a square root.

    Args:
        first: the loss, [], and the logits, [N, 10], of each model's first step, by name.
        exact: the logits in fp64.
        labels: [N].
        models: the models, by the same names.
        config: names the precision and the device.

    Raises:
        ProfileError: an error is larger, or not finite.
    """
    exact_values = (F.cross_entropy(exact, labels), exact)
    baseline = next(iter(first))
    n_layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in models[baseline].modules())
    rounding = math.sqrt(n_layers) * rounding_of(config.precision, torch.device(config.device))
    for name, values in first.items():
        for what, value, reference, exact_value in zip(
            ("loss", "logits"), values, first[baseline], exact_values, strict=True
        ):
            allowed = 2 * _norm([reference - exact_value]) + rounding * _norm([exact_value])
            error = _norm([value - exact_value])
            if not error <= allowed or not math.isfinite(error):
                raise ProfileError(
                    f"{name} is wrong and is not profiled: the error of the first step's {what} must be at most "
                    f"{allowed:.3g}, got {error:.3g}"
                )


def _gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    model = _exact(model)
    F.cross_entropy(model(images.double().contiguous()), labels).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [*gradients, *(buffer.double() for buffer in model.buffers())]


def _exact(model: nn.Module) -> nn.Module:
    """Return a copy in fp64 and training mode; NCHW, because cuDNN has few fp64 convolutions in channels_last."""
    model = copy.deepcopy(model).to(dtype=torch.float64, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.train()


def _norm(tensors: list[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(tensor.double())) for tensor in tensors))


def rounding_of(precision: str, device: torch.device) -> float:
    """Return the largest relative error of rounding a convolution's inputs; by default cuDNN rounds fp32 to TF32."""
    if precision == "fp32":
        return 2.0**-11 if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else 2.0**-24
    return 2.0**-8 if precision == "bf16" else 2.0**-11
