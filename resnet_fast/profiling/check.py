"""What is wrong is not profiled: the gradients in fp64, then loss and logits of the first step as it will be profiled.

Two checks, because each sees what the other cannot. Rounding to bf16 moves the gradients of a network with random
weights by 0.3 (ResNet-18) to 1.5 (ResNet-152) of their size, so there they tell little; and the loss is about log(10)
whatever the network does, so the logits are looked at, too.
"""

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.ops.backend import is_interpreted
from resnet_fast.profiling.recording import ProfileError
from resnet_fast.training.config import TrainConfig

# fp64 needs four times the memory of bf16: with so few images it fits wherever the step itself does.
N_IMAGES = 16
# Of all gradients and running statistics together, in L2 norm. Another order of summation in fp64 gives 4e-15
# (ResNet-18) to 2e-12 (ResNet-152), a block of ResNet-18 whose shortcut has lost its gradient 0.2.
MAX_DIFFERENCE = 1e-6


def refuse_interpreter() -> None:
    """Raise ProfileError where Triton's kernels are interpreted."""
    if is_interpreted():
        raise ProfileError(
            "interpreted kernels are not profiled: Triton's interpreter is thousands of times slower than what it "
            "interprets; switch it off"
        )


def check_gradients(models: Mapping[str, nn.Module], images: Tensor, labels: Tensor) -> None:
    """Compare the gradients and running statistics of the first model and the others on N_IMAGES images in fp64.

    Raises:
        ProfileError: they differ by more than MAX_DIFFERENCE of their size.
    """
    (_, expected), *others = models.items()
    for name, model in others:
        difference = gradient_difference(model, expected, images[:N_IMAGES], labels[:N_IMAGES])
        if not difference <= MAX_DIFFERENCE:  # not "difference > MAX_DIFFERENCE", which NaN passes
            raise ProfileError(
                f"{name} is wrong and is not profiled: in fp64 its gradients and running statistics must differ by at "
                f"most {MAX_DIFFERENCE:g} of their size, got {difference:.3g}"
            )


def gradient_difference(model: nn.Module, expected: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the relative L2 difference of two models' gradients and running statistics after a step in fp64."""
    ours, theirs = (_gradients(module, images, labels) for module in (model, expected))
    return _norm([our - their for our, their in zip(ours, theirs, strict=True)]) / _norm(theirs)


def exact_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of all images in fp64; forward only, which keeps no activations."""
    with torch.no_grad():
        return _exact(model)(images.double().contiguous())


def check_first_step(
    first: Mapping[str, tuple[Tensor, Tensor]],
    exact: Tensor,
    labels: Tensor,
    models: Mapping[str, nn.Module],
    config: TrainConfig,
) -> None:
    """Compare loss and logits: error against fp64 <= 2 x the first model's + sqrt(layers) roundings, in L2 norm.

    The first model's own error is what the precision costs. The second term is for where it happens to be exact: every
    layer rounds independently of the others, so their errors add up as a square root.

    Args:
        first: the loss, [], and the logits, [N, 10], of each model's first step.
        exact: the logits in fp64.
        labels: [N].
        models: by the same names.
        config: for the precision.

    Raises:
        ProfileError: a loss or a logit is not what it should be, or not finite.
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
    """A copy in fp64, in training mode; NCHW, because cuDNN has few fp64 convolutions in channels_last."""
    model = copy.deepcopy(model).to(dtype=torch.float64, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.train()


def _norm(tensors: list[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(tensor.double())) for tensor in tensors))


def rounding_of(precision: str, device: torch.device) -> float:
    """Return the largest relative error of one rounding of a convolution's inputs; in fp32 on a GPU cuDNN rounds them
    to TF32, by torch's default.
    """
    if precision == "fp32":
        return 2.0**-11 if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else 2.0**-24
    return 2.0**-8 if precision == "bf16" else 2.0**-11
