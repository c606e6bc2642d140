"""One fused operation, ours and as a user writes it, on the same random input: what the tests of the op share."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.functional import BatchNormArgs, batch_norm_add_relu
from resnet_fast.ops import reference

LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


@dataclass(frozen=True)
class Case:
    """A named corner: x is `mean` + `std` · N(0, 1) of this shape."""

    name: str
    shape: tuple[int, int, int, int]
    training: bool = True
    mean: float = 0.5
    std: float = 1.0
    affine: bool = True
    running: bool = True

    def __str__(self) -> str:
        return self.name


@dataclass
class Operands:
    x: Tensor
    residual: Tensor
    norms: list[BatchNormArgs]  # of x, and of the residual
    dy: Tensor

    def to(self, dtype: torch.dtype) -> "Operands":
        """A copy of the same values in another type, for the exact result."""
        norms = [
            BatchNormArgs(*(v.detach().clone().to(dtype) if isinstance(v, Tensor) else v for v in norm))
            for norm in self.norms
        ]
        x, residual, dy = (t.detach().clone().to(dtype) for t in (self.x, self.residual, self.dy))
        return replace(self, x=x, residual=residual, dy=dy, norms=norms)


def make_operands(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> Operands:
    generator = torch.Generator().manual_seed(len(case.name) + sum(case.shape))
    n_channels = case.shape[1]

    def image(mean: float = 0.0, std: float = 1.0) -> Tensor:
        tensor = mean + std * torch.randn(case.shape, generator=generator)
        return tensor.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])

    def vector(low: float, high: float) -> Tensor:
        vector = low + (high - low) * torch.rand(n_channels, generator=generator)
        return vector.to(device, torch.float64 if dtype == torch.float64 else torch.float32)

    norms = [
        BatchNormArgs(
            running_mean=vector(case.mean - 1, case.mean + 1) if case.running else None,
            running_var=vector(0.5, 2.0) if case.running else None,
            weight=vector(-1.5, 1.5) if case.affine else None,
            bias=vector(-1.0, 1.0) if case.affine else None,
            training=case.training,
            momentum=0.3,
        )
        for _ in range(2)
    ]
    return Operands(image(case.mean, case.std), image(), norms, image())


def ours(x: Tensor, residual: Tensor, norms: list[BatchNormArgs], join: str, relu: bool, backend: str) -> Tensor:
    return batch_norm_add_relu(
        x,
        *norms[0],
        residual=None if join == "none" else residual,
        residual_norm=norms[1] if join == "bn" else None,
        relu=relu,
        backend=backend,
    )


def eager(x: Tensor, residual: Tensor, norms: list[BatchNormArgs], join: str, relu: bool, backend: str = "") -> Tensor:
    y = F.batch_norm(x, *norms[0])
    if join == "bn":
        residual = F.batch_norm(residual, *norms[1])
    if join != "none":
        y = y + residual
    return F.relu(y) if relu else y


def results(operation, operands: Operands, join: str, relu: bool, backend: str = "") -> dict[str, Tensor]:
    """y, every gradient and every running statistic after one forward and backward of `operation`."""
    operands = operands.to(operands.x.dtype) if operands.x.dtype == torch.float64 else _detached(operands)
    leaves = {"x": operands.x, "residual": operands.residual}
    for prefix, norm in zip(("", "residual_"), operands.norms, strict=True):
        leaves |= {prefix + "weight": norm.weight, prefix + "bias": norm.bias}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    y = operation(operands.x, operands.residual, operands.norms, join, relu, backend)
    y.backward(operands.dy)
    found = {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for prefix, norm in zip(("", "residual_"), operands.norms, strict=True):
        if norm.running_mean is not None:
            found |= {prefix + "running_mean": norm.running_mean, prefix + "running_var": norm.running_var}
    return found


def magnitudes(operands: Operands, join: str, relu: bool) -> dict[str, Tensor]:
    """For every result that is a sum, the sum of its terms' magnitudes (the equations with absolute values)."""
    exact = operands.to(torch.float64)
    y = eager(exact.x, exact.residual, exact.norms, join, relu)
    exact = operands.to(torch.float64)  # afresh: the line above has updated the running statistics
    dz = exact.dy.where(y > 0, 0) if relu else exact.dy
    found = {"y": torch.zeros_like(y)}
    for prefix, x, norm in zip(("", "residual_"), (exact.x, exact.residual), exact.norms, strict=True):
        mean, var = reference.statistics(x) if norm.training else (norm.running_mean, norm.running_var)
        rstd = (var + norm.eps).rsqrt()
        scale = (rstd if norm.weight is None else rstd * norm.weight).abs()[None, :, None, None]
        bias = 0 if norm.bias is None else norm.bias.abs()[None, :, None, None]
        normalized = reference.normalize(x, mean, rstd, None, None).abs()
        terms = dz.abs() * normalized
        found |= {f"d{prefix}bias": dz.abs().sum((0, 2, 3)), f"d{prefix}weight": terms.sum((0, 2, 3))}
        found[prefix + "running_var"] = var
        parts = dz.abs()
        if norm.training:
            parts = parts + dz.abs().mean((0, 2, 3), True) + normalized * terms.mean((0, 2, 3), True)
        found["dresidual" if prefix else "dx"] = scale * parts
        if not prefix or join == "bn":
            found["y"] += (x - mean[None, :, None, None]).abs() * scale + bias
    return found


def _detached(operands: Operands) -> Operands:
    norms = [
        BatchNormArgs(*(v.detach().clone() if isinstance(v, Tensor) else v for v in norm)) for norm in operands.norms
    ]
    x, residual = operands.x.detach().clone(), operands.residual.detach().clone()
    return replace(operands, x=x, residual=residual, norms=norms)
