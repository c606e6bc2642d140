"""The self-check: compare the fused operation and a network's training step on this machine with the formula.

The largest error of a result against fp64 (ops/reference.py), relative to its largest value, may be at most

    2 · eager's error + half an eps of the result's type + ROUNDINGS eps of the accumulation's type

Eager's share is capped, so that a torch that computes wrong results excuses nothing. tests/ checks far more.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import find_call
from ..ops import aten, reference
from ..ops.arguments import BatchNormArgs, accumulation_type

LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
RANGES = {"running_mean": (-1, 1), "running_var": (0.5, 2), "weight": (0.5, 1.5), "bias": (-1, 1)}
TRAINING_STEP = "training step of a ResNet, fp64, 4x3x8x8, against torchvision"
N_CHECKS = 7

# A term is rounded up to 30 times (kernels/README.md: N1, B2-B4), and a sum of 256 terms of both signs is 16 times
# smaller than the sum of their magnitudes. Independent errors add up as a square root: 5.5 · 16 half eps.
ROUNDINGS = 44
EAGER_ROUNDINGS = 4  # eager rounds after up to four steps: two batch norms, the sum, and the tensors it saves
STEP_TOLERANCE = 1e-9  # ten layers in fp64 differ by 1e-14, a wrong formula by at least 1e-4
# A GPU's first run compiles up to six kernels per case, 0.3 s each, and twenty for the step. To end within 10 s, no
# case starts after 8 s, and the step not after 3. Compiled kernels are cached, so the next run gets further.
SECONDS_FOR_CASES, SECONDS_BEFORE_STEP = 8.0, 3.0


class Case(NamedTuple):
    """One operation with batch statistics; `join` is "none", "add" or "bn", and x has `shape` in `layout`."""

    join: str
    layout: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int]

    def __str__(self) -> str:
        return f"{self.join} join, {self.layout}, {NAMES[self.dtype]}, {'x'.join(map(str, self.shape))}"


class Check(NamedTuple):
    """A result, or why there is none, and its error as a share of the allowed one (above 1 it is wrong)."""

    case: str
    result: str
    share: float


def cases(half: torch.dtype) -> list[Case]:
    """Return cases that cover joins, types and layouts; only a few, because a GPU compiles each."""
    return [
        Case("none", "channels_last", torch.float32, (3, 13, 5, 7)),
        Case("add", "channels_last", half, (4, 64, 8, 8)),
        Case("bn", "channels_last", half, (4, 64, 8, 8)),
        Case("none", "nchw", half, (3, 13, 5, 7)),
        Case("add", "nchw", torch.float32, (5, 24, 7, 7)),
        Case("bn", "nchw", torch.float32, (3, 13, 5, 7)),
    ]


def self_check(device: torch.device, half: torch.dtype) -> list[Check]:
    """Return the worst check of each case and of the training step, without those that would start too late."""
    jobs = {str(case): (partial(check_case, case, device), SECONDS_FOR_CASES) for case in cases(half)}
    jobs[TRAINING_STEP] = (partial(check_step, device), SECONDS_BEFORE_STEP)
    checks, begin = [], time.monotonic()
    for case, (run_checks, latest) in jobs.items():
        if time.monotonic() - begin < latest:
            try:
                checks.append(max(run_checks(), key=lambda check: check.share))
            except Exception as error:  # anything that a broken compiler or driver raises
                checks.append(Check(case, first_line(error), math.inf))
    return checks


def judge(case: object, name: str, error: float, allowed: float) -> Check:
    share = error / allowed if math.isfinite(error) else math.inf
    return Check(str(case), f"{name} is off by {error:.2g}, allowed {allowed:.2g}", share)


def run_batch_norm(x: Tensor, norm, residual, residual_norm, relu: bool) -> Tensor:
    """Run the fused operation."""
    return find_call(x, norm, residual, residual_norm, relu)(x, norm, residual, residual_norm, False)


def check_case(case: Case, device: torch.device) -> Iterator[Check]:
    """Check y, every gradient and every running statistic of the fused operation."""
    ours = compute(case, device, partial(run_batch_norm, relu=True))
    eager = compute(case, device, partial(aten.batch_norm_add_relu, relu=True))
    exact, exact_of_eager = (
        compute(case, device, partial(formula, results["y"] <= 0), torch.float64) for results in (ours, eager)
    )
    for name, result in ours.items():
        eps, size = torch.finfo(result.dtype).eps, largest(exact[name])
        allowed = 2 * min(largest(eager[name] - exact_of_eager[name]), EAGER_ROUNDINGS * eps * size) + eps / 2 * size
        allowed += ROUNDINGS * torch.finfo(accumulation_type(result)).eps * size
        yield judge(case, name, largest(result - exact[name]), allowed)


def check_step(device: torch.device) -> Iterator[Check]:
    """Check a step in fp64, where almost no activation is within a rounding of 0, at which ReLU's gradient jumps."""
    from torchvision.models import resnet as torchvision_resnet  # here, because doctor also runs without it

    from ..models import resnet
    from ..profiling.check import gradient_difference

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, labels = torch.randn(4, 3, 8, 8), torch.tensor([3, 1, 4, 1])
        ours = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, stem="cifar")
        theirs = torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    resnet.give_cifar_stem(theirs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    difference = gradient_difference(ours.to(device), theirs.to(device), images.to(device), labels.to(device))
    yield judge(TRAINING_STEP, "its gradient", difference, STEP_TOLERANCE)


def compute(
    case: Case, device: torch.device, operation: Callable[..., Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return y, every gradient and every running statistic of operation(x, norm, residual, residual_norm).

    Each call draws the same values. It computes in fp32 and the case's type, or converts the values to `dtype`.
    """
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name in ("x", "dy") if case.join == "none" else ("x", "dy", "residual"):
        image = torch.randn(case.shape, generator=generator) + (0.5 if name == "x" else 0)
        image = image.to(device, case.dtype).to(dtype or case.dtype)
        tensors[name] = image.contiguous(memory_format=LAYOUTS[case.layout])
    norms = []
    for prefix in ("", "residual_") if case.join == "bn" else ("",):
        for name, (low, high) in RANGES.items():
            vector = low + (high - low) * torch.rand(case.shape[1], generator=generator)
            tensors[prefix + name] = vector.to(device, dtype)
        norms.append(BatchNormArgs(*(tensors[prefix + name] for name in RANGES), training=True, momentum=0.3))
    dy = tensors.pop("dy")
    running = {name: tensor for name, tensor in tensors.items() if "running" in name}
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items() if name not in running}
    y = operation(tensors["x"], norms[0], tensors.get("residual"), norms[1] if case.join == "bn" else None)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy, materialize_grads=True)
    return {"y": y.detach(), **running, **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def formula(relu_mask: Tensor, x: Tensor, norm: BatchNormArgs, residual: Tensor | None, residual_norm) -> Tensor:
    """Compute the formula; ReLU's gradient, which jumps at 0, counts as 0 where the checked result is 0."""
    z = exact_batch_norm(x, *norm)
    if residual is not None:
        z = z + (residual if residual_norm is None else exact_batch_norm(residual, *residual_norm))
    open_part = z.masked_fill(relu_mask, 0)
    return open_part + (z.relu() - open_part).detach()


def exact_batch_norm(x: Tensor, running_mean, running_var, weight, bias, training, momentum, eps) -> Tensor:
    mean, var = reference.statistics(x)
    n_rows = x.numel() // x.shape[1]
    running_mean.lerp_(mean.detach(), momentum)
    running_var.lerp_(var.detach() * n_rows / (n_rows - 1), momentum)
    return reference.normalize(x, mean, (var + eps).rsqrt(), weight, bias)


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def first_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
