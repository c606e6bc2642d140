"""The self-check: the fused operation and a network's training step, computed on this machine, against the formula.

    checks = self_check(device, half=torch.bfloat16)  # a list of Check

An operation's result passes where its largest error against fp64 (ops/reference.py) is at most

    2 · eager's error + 1 rounding of the result's type + ROUNDINGS roundings, of the accumulation's type, of its terms

with eager's share capped, so that a torch that computes wrong excuses nothing. tests/ looks at far more, and closer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from .functional import BatchNormArgs, batch_norm_add_relu
from .models import resnet
from .ops import reference
from .ops.arguments import accumulation_type

LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
TRAINING_STEP = "training step of a ResNet, fp64, 4x3x8x8, against torchvision"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# A term is rounded up to 30 times on its way (kernels/README.md: N1, B2-B4). Independent errors add up as the square
# root of their number, 5.5; the largest of thousands is half as large again.
ROUNDINGS = 8
# Eager rounds after each of up to four steps: two batch norms, the sum, and what it saves.
EAGER_ROUNDINGS = 4
# fp64 rounds at 1e-16, of which ten layers make 1e-14; a wrong formula shows from 1e-4 on.
STEP_TOLERANCE = 1e-9
# A GPU's first run compiles up to six kernels per case, 0.3 s each, and twenty for the step. To end within 10 s, no
# case begins after 8 s and the step not after 3: compiled kernels are kept, so that the next run gets further.
SECONDS_FOR_CASES, SECONDS_BEFORE_STEP = 8.0, 3.0


class Case(NamedTuple):
    """One operation with batch statistics: join "none", "add" or "bn", and x: `shape` in `layout`."""

    join: str
    layout: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int]

    def __str__(self) -> str:
        return f"{self.join} join, {self.layout}, {NAMES[self.dtype]}, {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Check:
    """What came out of one case: the result that used most of its allowance; or `problem`, why there is none."""

    case: str
    result: str = ""
    error: float = float("nan")
    allowed: float = float("nan")
    problem: str = ""
    skipped: bool = False

    @property
    def ok(self) -> bool:
        return self.skipped or (not self.problem and self.error <= self.allowed)

    @property
    def used(self) -> float:
        """The share of the allowance that the error takes; NaN counts as the worst."""
        share = self.error / self.allowed if self.allowed > 0 else self.error * float("inf") if self.error else 0.0
        return share if share == share else float("inf")


def cases(half: torch.dtype) -> list[Case]:
    """Every join in both layouts and in both types, and every type in both layouts; few, for a GPU compiles each."""
    return [
        Case("none", "channels_last", torch.float32, (3, 13, 5, 7)),
        Case("add", "channels_last", half, (4, 64, 8, 8)),
        Case("bn", "channels_last", half, (4, 64, 8, 8)),
        Case("none", "nchw", half, (3, 13, 5, 7)),
        Case("add", "nchw", torch.float32, (5, 24, 7, 7)),
        Case("bn", "nchw", torch.float32, (3, 13, 5, 7)),
    ]


@dataclass
class Operands:
    x: Tensor
    norm: BatchNormArgs
    residual: Tensor | None
    residual_norm: BatchNormArgs | None
    dy: Tensor

    def batch_norms(self) -> list[tuple[str, Tensor, BatchNormArgs]]:
        """(prefix of its results' names, input, arguments) of each batch norm."""
        found = [("", self.x, self.norm)]
        if self.residual is not None and self.residual_norm is not None:
            found.append(("residual_", self.residual, self.residual_norm))
        return found

    def copy(self, dtype: torch.dtype | None = None) -> "Operands":
        """For one pass, which updates the running statistics; `dtype`: of everything."""

        def one(value: Any) -> Any:
            if isinstance(value, BatchNormArgs):
                return BatchNormArgs(*map(one, value))
            return value.to(dtype or value.dtype, copy=True) if isinstance(value, Tensor) else value

        return Operands(*(one(value) for value in (self.x, self.norm, self.residual, self.residual_norm, self.dy)))


def make_operands(case: Case, device: torch.device) -> Operands:
    """Random values, the same in each run and on each device."""
    generator = torch.Generator().manual_seed(0)

    def image(mean: float = 0.0) -> Tensor:
        values = mean + torch.randn(case.shape, generator=generator)
        return values.to(device, case.dtype).contiguous(memory_format=LAYOUTS[case.layout])

    def norm() -> BatchNormArgs:
        low_high = ((-1.0, 1.0), (0.5, 2.0), (0.5, 1.5), (-1.0, 1.0))  # running mean and variance, weight, bias
        vectors = (low + (high - low) * torch.rand(case.shape[1], generator=generator) for low, high in low_high)
        return BatchNormArgs(*(vector.to(device) for vector in vectors), training=True, momentum=0.3)

    residual = None if case.join == "none" else image()
    return Operands(image(0.5), norm(), residual, norm() if case.join == "bn" else None, image())


def _ours(o: Operands) -> Tensor:
    return batch_norm_add_relu(o.x, *o.norm, residual=o.residual, residual_norm=o.residual_norm)


def _eager(o: Operands) -> Tensor:
    y = F.batch_norm(o.x, *o.norm)
    if o.residual is not None:
        y = y + (o.residual if o.residual_norm is None else F.batch_norm(o.residual, *o.residual_norm))
    return y.relu()


def _results(operation: Callable[[Operands], Tensor], operands: Operands) -> dict[str, Tensor]:
    """y, every gradient and every running statistic after one forward and backward."""
    operands = operands.copy()
    leaves = {"x": operands.x} if operands.residual is None else {"x": operands.x, "residual": operands.residual}
    for prefix, _, norm in operands.batch_norms():
        leaves |= {prefix + name: getattr(norm, name) for name in ("weight", "bias")}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = operation(operands)
    gradients = torch.autograd.grad(y, list(leaves.values()), operands.dy, allow_unused=True)
    # No gradient is one of zero.
    found = {
        f"d{name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    for prefix, _, norm in operands.batch_norms():
        found |= {prefix + name: getattr(norm, name) for name in ("running_mean", "running_var")}
    return found | {"y": y.detach()}


def _exact(operands: Operands, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`_results` by the formula in fp64, and of each the sum of its terms' magnitudes.

    ReLU's gradient jumps at 0: it counts as closed where `y`, the result that is judged, is 0.
    """
    exact = operands.copy(torch.float64)
    dz = exact.dy.masked_fill(y <= 0, 0)
    z, z_terms = torch.zeros_like(dz), torch.zeros_like(dz)
    found, terms = {}, {}
    if exact.residual is not None and exact.residual_norm is None:
        z, z_terms = exact.residual, exact.residual.abs()
        found["dresidual"], terms["dresidual"] = dz, dz.abs()
    for prefix, x, norm in exact.batch_norms():
        mean, var = reference.statistics(x)
        rstd, n_rows = (var + norm.eps).rsqrt(), x.numel() // x.shape[1]
        z = z + reference.normalize(x, mean, rstd, norm.weight, norm.bias)
        gradients = reference.backward(dz, x, mean, rstd, norm.weight, training=True)
        old, new = 1 - norm.momentum, norm.momentum
        assert norm.running_mean is not None and norm.running_var is not None
        running_var = old * norm.running_var + new * var * n_rows / (n_rows - 1)  # the unbiased one
        statistics = (old * norm.running_mean + new * mean, running_var)

        # The same equations of magnitudes, where every sign is a plus.
        assert norm.weight is not None and norm.bias is not None
        size, zero, weight, bias = (x - mean[None, :, None, None]).abs(), 0 * mean, norm.weight.abs(), norm.bias.abs()
        z_terms = z_terms + reference.normalize(size, zero, rstd, weight, bias)
        sums = reference.gradient_sums(dz.abs(), size, zero, rstd)
        mean_dz, mean_dz_xhat = (-total / n_rows for total in sums)
        dx_terms = reference.input_gradient(dz.abs(), size, zero, rstd, weight, mean_dz, mean_dz_xhat, True)
        mean_terms = old * norm.running_mean.abs() + new * x.abs().mean(reference.PER_CHANNEL)

        names = ["dresidual" if prefix else "dx", f"d{prefix}weight", f"d{prefix}bias"]
        names += [prefix + "running_mean", prefix + "running_var"]
        found |= zip(names, (*gradients, *statistics), strict=True)
        terms |= zip(names, (dx_terms, sums[1], sums[0], mean_terms, running_var), strict=True)
    return found | {"y": z.relu()}, terms | {"y": z_terms}


def check_case(case: Case, device: torch.device) -> Check:
    """One case on one device; an exception is a problem, which fails, not raised."""
    try:
        operands = make_operands(case, device)
        ours, eager = _results(_ours, operands), _results(_eager, operands)
        exact, terms = _exact(operands, ours["y"])
        exact_of_eager, _ = _exact(operands, eager["y"])
        checks = []
        for name, result in ours.items():
            eps, size = torch.finfo(result.dtype).eps, terms[name].max().item()
            eagers = (eager[name].double() - exact_of_eager[name]).abs().max().item()
            allowed = 2 * min(eagers, EAGER_ROUNDINGS * eps * size) + eps / 2 * exact[name].abs().max().item()
            allowed += ROUNDINGS * torch.finfo(accumulation_type(result)).eps / 2 * size
            checks.append(Check(str(case), name, (result.double() - exact[name]).abs().max().item(), allowed))
        return max(checks, key=lambda check: check.used)
    except Exception as error:  # whatever a broken compiler or driver raises
        return Check(str(case), problem=describe(error))


def check_training_step(device: torch.device) -> Check:
    """Logits, gradients and buffers of a ResNet with one block per stage against torchvision's: the worst, relative.

    In fp64, where practically no activation lies within a rounding of ReLU's kink, at which gradients jump.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ours = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, stem="cifar")
            images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
            theirs = torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
        resnet.give_cifar_stem(theirs)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        found, expected = (_step(model.to(device, torch.float64), images.to(device)) for model in (ours, theirs))
        checks = []
        for name, exact in expected.items():
            error, size = (found[name] - exact).norm().item(), exact.norm().item()
            checks.append(Check(TRAINING_STEP, name, error / size if size else error, STEP_TOLERANCE))
        return max(checks, key=lambda check: check.used)
    except Exception as error:
        return Check(TRAINING_STEP, problem=describe(error))


def _step(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    images = images.contiguous(memory_format=torch.channels_last)
    logits = model.to(memory_format=torch.channels_last)(images)  # type: ignore[call-overload]
    F.cross_entropy(logits, torch.tensor([3, 1, 4, 1], device=images.device)).backward()
    found = {"logits": logits.detach()}
    found |= {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.double() for name, buffer in model.named_buffers()}


def self_check(device: torch.device, half: torch.dtype) -> list[Check]:
    """Every one of `cases` and the training step on `device`; what begins too late is skipped.

    Args:
        half: the 16-bit type to check beside fp32, torch.bfloat16 or torch.float16.

    Returns:
        One Check each, in order; nothing is raised.
    """
    start = time.monotonic()
    checks = []
    for case in cases(half):
        in_time = time.monotonic() - start < SECONDS_FOR_CASES
        checks.append(check_case(case, device) if in_time else Check(str(case), skipped=True))
    in_time = time.monotonic() - start < SECONDS_BEFORE_STEP
    return [*checks, check_training_step(device) if in_time else Check(TRAINING_STEP, skipped=True)]


def describe(error: BaseException) -> str:
    """An exception on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
