"""One whole training step of ResNet-18 (3x3 stem, 10 classes), of each provider, checked before it may be timed.

    step = forward -> cross entropy -> backward -> SGD with Nesterov momentum

    steps = checked_steps(Setting(torch.device("cuda"), "bf16", 128))   # {"eager": ..., "fused": ...}
    steps["fused"]()                                                    # one step

Numerics: in bf16 the forward runs under autocast; weights, gradients and optimizer state are fp32. In fp32 on a GPU
cuDNN's convolutions round their inputs to TF32, torch's default, for every provider alike.
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast  # before torchvision, which it lets import beside a CPU build of torch
from resnet_fast.ops import why_not_triton

# isort: split
from torchvision.models import resnet18 as torchvision_resnet18

PRECISIONS = ("fp32", "bf16")
BATCH_SIZES = {"cpu": (32,), "cuda": (128, 512)}  # what suits the device
N_CLASSES = 10
N_BATCHES = 4  # in rotation: no step finds the images of the step before in a cache
# Small: the labels are random, and a step on infinite or NaN values is not the step that is asked about.
LEARNING_RATE = 0.01
# Layers on the longest path between images and gradients: 17 convolutions and the linear one, forward and backward.
N_ROUNDINGS = 36


@dataclass(frozen=True)
class Setting:
    """What all providers are given alike.

    Args:
        device: where the step runs.
        precision: "fp32", or "bf16": autocast to bfloat16 with fp32 weights.
        batch_size: images per step.
        image_size: height and width of the images.
    """

    device: torch.device
    precision: str
    batch_size: int
    image_size: int = 32

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, got {self.batch_size}")

    def __str__(self) -> str:
        return f"{self.device.type}, {self.precision}, batch {self.batch_size}"


class WrongProviderError(RuntimeError):
    """A provider does not compute the training step, so it is not timed."""


def eager() -> nn.Module:
    """torchvision's ResNet-18, with the stem changed as its users change it."""
    model = torchvision_resnet18(num_classes=N_CLASSES)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model


def fused() -> nn.Module:
    return resnet_fast.resnet18(stem="cifar", num_classes=N_CLASSES)


# The first one is the baseline: the others are compared with it.
PROVIDERS: Mapping[str, Callable[[], nn.Module]] = {"eager": eager, "fused": fused}


class TrainingStep:
    """A model, its optimizer and its images; a call runs one step on the next batch and returns the loss."""

    def __init__(self, model: nn.Module, setting: Setting, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.model, self.setting = model.train(), setting
        self.batches = itertools.cycle(batches)
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
        )

    def __call__(self) -> Tensor:
        images, labels = next(self.batches)
        self.optimizer.zero_grad(set_to_none=True)  # first, so that the gradients can be looked at after the step
        with torch.autocast(self.setting.device.type, torch.bfloat16, enabled=self.setting.precision == "bf16"):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def checked_steps(
    setting: Setting, providers: Mapping[str, Callable[[], nn.Module]] = PROVIDERS
) -> dict[str, TrainingStep]:
    """Build the step of every provider from the same weights and batches, run the first one, and check it.

    Returns:
        The steps by provider, each one step after its beginning.

    Raises:
        WrongProviderError: a loss, gradient or running statistic is outside the budget of `_check`.
    """
    device = setting.device
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # torch refuses "cuda" without a number here
        torch.backends.cudnn.benchmark = True
    batches = _random_batches(setting)
    with torch.random.fork_rng(devices=[]):  # the models are made on the CPU
        torch.manual_seed(0)
        models = {name: make() for name, make in providers.items()}
    baseline = next(iter(models.values()))
    for model in models.values():
        model.load_state_dict(baseline.state_dict(), strict=True)
    exact = _exact_first_step(copy.deepcopy(baseline), *batches[0], device)

    steps: dict[str, TrainingStep] = {}
    errors: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        steps[name] = TrainingStep(model, setting, batches)
        found = _observe(model, steps[name]())
        errors[name] = {key: _distance(found[key], exact[key]) for key in exact}
    eager_errors = next(iter(errors.values()))
    for name in steps:
        _check(name, errors[name], eager_errors, exact, setting)
    return steps


def refuse_interpreter() -> None:
    """Raise RuntimeError where Triton's kernels are interpreted: their time says nothing about compiled ones."""
    if why_not_triton(torch.device("cpu")) is None:  # Triton runs on CPU tensors in its interpreter only
        raise RuntimeError(
            "interpreted kernels are not timed: Triton's interpreter is thousands of times slower than what it "
            "interprets; unset TRITON_INTERPRET"
        )


def _random_batches(setting: Setting) -> list[tuple[Tensor, Tensor]]:
    """Random images in channels_last, never zeros, on which a processor draws less power and clocks higher."""
    generator = torch.Generator().manual_seed(1)
    shape = (setting.batch_size, 3, setting.image_size, setting.image_size)
    batches = []
    for _ in range(N_BATCHES):
        images = torch.randn(shape, generator=generator).to(setting.device)
        labels = torch.randint(N_CLASSES, shape[:1], generator=generator).to(setting.device)
        batches.append((images.contiguous(memory_format=torch.channels_last), labels))
    return batches


def _exact_first_step(baseline: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> dict[str, Tensor]:
    # NCHW, because cuDNN has few fp64 convolutions in channels_last.
    model = baseline.to(device=device, dtype=torch.float64, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    loss = F.cross_entropy(model.train()(images.double().contiguous()), labels)
    loss.backward()
    return _observe(model, loss.detach())


def _observe(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The loss, every gradient and every buffer after a step; zeros for a gradient that there is not."""
    found = {"loss": loss.clone()}
    for name, parameter in model.named_parameters():
        found[f"d {name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def _distance(found: Tensor, exact: Tensor) -> float:
    return torch.linalg.vector_norm(found.double() - exact.double()).item()


def _check(
    name: str, errors: dict[str, float], eager_errors: dict[str, float], exact: dict[str, Tensor], setting: Setting
) -> None:
    """Error against fp64 <= 2 x eager's own error + sqrt(36) roundings of the exact value, in L2 norm.

    Eager's own error is what the precision costs; no provider has to be better, and one that computes something else
    is off by far more than twice of it. The second term is for those values where eager happens to be exact: the 36
    layers between images and gradients round independently of each other, so their errors add up as a square root.
    """
    for key, value in exact.items():
        allowed = 2 * eager_errors[key] + math.sqrt(N_ROUNDINGS) * _unit_roundoff(setting) * _distance(value, 0 * value)
        if not errors[key] <= allowed:  # not "errors > allowed", which NaN passes
            raise WrongProviderError(
                f"{name} is wrong and is not timed ({setting}): the error of {key!r} after the first step must be at "
                f"most {allowed:.3g}, got {errors[key]:.3g}"
            )


def _unit_roundoff(setting: Setting) -> float:
    """The largest relative error of one rounding of a convolution's inputs."""
    if setting.precision == "bf16":
        return 2.0**-8
    return 2.0**-11 if setting.device.type == "cuda" and torch.backends.cudnn.allow_tf32 else 2.0**-24
