"""The self-check: the fused operation and a network's training step, computed on this machine, against the formula.

The largest error of a result against fp64 (ops/reference.py), relative to its largest value, may be

    2 · eager's error + half an eps of the result's type + ROUNDINGS eps of the accumulation's type

with eager's share capped, so that a torch that computes wrong excuses nothing. tests/ looks at far more, and closer.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import resnet as torchvision_resnet

from ..functional import batch_norm_add_relu
from ..models import resnet
from ..ops import reference
from ..ops.arguments import BatchNormArgs, accumulation_type
from ..profiling.check import gradient_difference

LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
RANGES = {"running_mean": (-1, 1), "running_var": (0.5, 2), "weight": (0.5, 1.5), "bias": (-1, 1)}
TRAINING_STEP = "training step of a ResNet, fp64, 4x3x8x8, against torchvision"
N_CHECKS = 7

# A term is rounded up to 30 times on its way (kernels/README.md: N1, B2-B4), and a sum of 256 terms whose signs differ
# is 16 times smaller than they are together. Independent errors add up as square roots: 5.5 · 16 half eps.
ROUNDINGS = 44
EAGER_ROUNDINGS = 4  # eager rounds after each of up to four steps: two batch norms, the sum, and what it saves
STEP_TOLERANCE = 1e-9  # in fp64 ten layers make 1e-14; a wrong formula shows from 1e-4 on
# A GPU's first run compiles up to six kernels per case, 0.3 s each, and twenty for the step. To end within 10 s, no
# case begins after 8 s and the step not after 3: compiled kernels are kept, so that the next run gets further.
SECONDS_FOR_CASES, SECONDS_BEFORE_STEP = 8.0, 3.0

Operands = dict[str, Tensor]  # x, dy, residual; the RANGES of x's batch norm, and with "residual_" of the residual's
Errors = Iterator[tuple[str, float, float]]  # the name of a result, its error, and what is allowed


class Case(NamedTuple):
    """One operation with batch statistics: join "none", "add" or "bn", and x: `shape` in `layout`."""

    join: str
    layout: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int]

    def __str__(self) -> str:
        return f"{self.join} join, {self.layout}, {NAMES[self.dtype]}, {'x'.join(map(str, self.shape))}"


class Check(NamedTuple):
    """The result of a case that takes the largest share of its allowance, or why there is none; above 1 it is wrong."""

    case: str
    result: str
    share: float


def cases(half: torch.dtype) -> list[Case]:
    """Every join and every type in both layouts; few, because a GPU compiles each."""
    return [
        Case("none", "channels_last", torch.float32, (3, 13, 5, 7)),
        Case("add", "channels_last", half, (4, 64, 8, 8)),
        Case("bn", "channels_last", half, (4, 64, 8, 8)),
        Case("none", "nchw", half, (3, 13, 5, 7)),
        Case("add", "nchw", torch.float32, (5, 24, 7, 7)),
        Case("bn", "nchw", torch.float32, (3, 13, 5, 7)),
    ]


def self_check(device: torch.device, half: torch.dtype) -> list[Check]:
    """Check all cases, with the 16-bit type `half`, and the training step, except what would begin too late."""
    checks, begin = [], time.monotonic()
    for case in cases(half):
        if time.monotonic() - begin < SECONDS_FOR_CASES:
            checks.append(check(case, partial(case_errors, case, device)))
    if time.monotonic() - begin < SECONDS_BEFORE_STEP:
        checks.append(check(TRAINING_STEP, partial(step_errors, device)))
    return checks


def check(case: object, errors: Callable[[], Errors]) -> Check:
    """Return the worst result of a case; an exception, whatever a broken compiler or driver raises, is the worst."""
    worst = Check(str(case), "", 0.0)
    try:
        for name, error, allowed in errors():
            share = error / allowed if math.isfinite(error) else math.inf
            if share >= worst.share:
                worst = Check(str(case), f"{name} is off by {error:.2g}, allowed {allowed:.2g}", share)
    except Exception as error:
        return Check(str(case), first_line(error), math.inf)
    return worst


def case_errors(case: Case, device: torch.device) -> Errors:
    ours = _results(_ours, make_operands(case, device))
    eager = _results(lambda operands: _before_relu(F.batch_norm, operands).relu(), make_operands(case, device))
    exact, exact_of_eager = _exact(case, ours["y"]), _exact(case, eager["y"])
    for name, result in ours.items():
        eps, size = torch.finfo(result.dtype).eps, exact[name].abs().max().item()
        allowed = 2 * min(_largest(eager[name] - exact_of_eager[name]), EAGER_ROUNDINGS * eps * size) + eps / 2 * size
        allowed += ROUNDINGS * torch.finfo(accumulation_type(result)).eps * size
        yield name, _largest(result - exact[name]), allowed


def step_errors(device: torch.device) -> Errors:
    """In fp64, where practically no activation lies within a rounding of ReLU's kink, at which gradients jump."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, labels = torch.randn(4, 3, 8, 8), torch.tensor([3, 1, 4, 1])
        ours = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, stem="cifar")
        theirs = torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    resnet.give_cifar_stem(theirs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    difference = gradient_difference(ours.to(device), theirs.to(device), images.to(device), labels.to(device))
    yield "its gradient", difference, STEP_TOLERANCE


def make_operands(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> Operands:
    """The same random values at each call, for a pass updates the running statistics; in fp32 and the case's type, or
    these values in `dtype`.
    """
    generator, operands = torch.Generator().manual_seed(0), {}
    for name, mean in {"x": 0.5, "dy": 0.0, **({} if case.join == "none" else {"residual": 0.0})}.items():
        image = (mean + torch.randn(case.shape, generator=generator)).to(device, case.dtype).to(dtype or case.dtype)
        operands[name] = image.contiguous(memory_format=LAYOUTS[case.layout])
    for prefix in ("", "residual_")[: 2 if case.join == "bn" else 1]:
        for name, (low, high) in RANGES.items():
            vector = low + (high - low) * torch.rand(case.shape[1], generator=generator)
            operands[prefix + name] = vector.to(device, dtype)
    return operands


def _norm(operands: Operands, prefix: str = "") -> BatchNormArgs:
    return BatchNormArgs(*(operands[prefix + name] for name in RANGES), training=True, momentum=0.3)


def _ours(operands: Operands) -> Tensor:
    residual_norm = _norm(operands, "residual_") if "residual_bias" in operands else None
    residual = operands.get("residual")
    return batch_norm_add_relu(operands["x"], *_norm(operands), residual=residual, residual_norm=residual_norm)


def _before_relu(batch_norm: Callable[..., Tensor], operands: Operands) -> Tensor:
    z, residual = batch_norm(operands["x"], *_norm(operands)), operands.get("residual", 0)
    return z + (batch_norm(residual, *_norm(operands, "residual_")) if "residual_bias" in operands else residual)


def _formula(x: Tensor, *arguments) -> Tensor:
    norm = BatchNormArgs(*arguments)
    mean, var = reference.statistics(x)
    n_rows = x.numel() // x.shape[1]
    for running, value in ((norm.running_mean, mean), (norm.running_var, var * n_rows / (n_rows - 1))):
        assert running is not None
        running.lerp_(value.detach(), norm.momentum)
    return reference.normalize(x, mean, (var + norm.eps).rsqrt(), norm.weight, norm.bias)


def _results(operation: Callable[[Operands], Tensor], operands: Operands) -> Operands:
    """y, every gradient and every running statistic after one forward and backward."""
    running = {name: tensor for name, tensor in operands.items() if "running" in name}
    leaves = {name: operands[name].requires_grad_() for name in operands.keys() - running.keys() - {"dy"}}
    y = operation(operands)
    gradients = torch.autograd.grad(y, list(leaves.values()), operands["dy"], materialize_grads=True)
    return {"y": y.detach(), **running, **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def _exact(case: Case, y: Tensor) -> Operands:
    """By the formula in fp64. ReLU's gradient jumps at 0: it counts as closed where `y`, which is judged, is 0."""
    operands = make_operands(case, y.device, torch.float64)
    operands["dy"] = operands["dy"].masked_fill(y <= 0, 0)
    results = _results(partial(_before_relu, _formula), operands)
    return results | {"y": results["y"].relu()}


def _largest(error: Tensor) -> float:
    return error.abs().max().item()


def first_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
