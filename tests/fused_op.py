"""One fused operation, ours and as a user writes it, on the same random input; shared by the tests of the operation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from budget import ROUNDINGS, assert_within_budget
from torch import Tensor

from resnet_fast.functional import BatchNormArgs, batch_norm_add_relu
from resnet_fast.ops import reference

PER_CHANNEL = reference.PER_CHANNEL
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}

# Views with gaps, overlaps or axes in another order, of a dense NCHW tensor.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": lambda image: F.pad(image, (1, 2, 1, 0))[:, :, 1:, 1:-2],
    "every second channel": lambda image: _channels_last(image.repeat_interleave(2, 1))[:, ::2],
    "transposed": lambda image: image.mT.contiguous().mT,
    "channels first": lambda image: image.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda image: image[:1].expand_as(image),  # as the gradient of a mean over images comes
    "one value": lambda image: image[:1, :1, :1, :1].expand_as(image),  # as the gradient of y.sum() comes
}


def _channels_last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


def arrange(image: Tensor, layout: str) -> Tensor:
    """`image`, dense NCHW, in one of LAYOUTS or as one of VIEWS (the last two repeat values of it)."""
    return VIEWS[layout](image) if layout in VIEWS else image.contiguous(memory_format=LAYOUTS[layout])


def channels(vector: Tensor) -> Tensor:
    """[C] -> [1, C, 1, 1]."""
    return vector[None, :, None, None]


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
    residual_training: bool | None = None  # None: as `training`
    momentum: float = 0.3
    eps: float = 1e-5
    fork: bool = False
    dy_std: float = 1.0
    vectors_as_x: bool = False  # in the type of x, not in fp32
    residual_layout: str | None = None  # None: that of x
    dy_layout: str | None = None
    seed: int = 0
    ghost: int | None = None  # images per ghost batch

    def __str__(self) -> str:
        return self.name


CORNERS = (
    Case("one image", (1, 24, 4, 4)),
    Case("one channel", (4, 1, 3, 5)),
    Case("odd channels", (2, 13, 8, 8)),
    Case("7x7, several tiles and splits", (3, 24, 7, 7)),
    Case("one pixel per image", (33, 16, 1, 1)),
    Case("one value per channel, evaluation", (1, 16, 1, 1), training=False),
    Case("evaluation", (3, 20, 5, 5), training=False),
    Case("no affine, no running statistics", (2, 16, 5, 5), affine=False, running=False),
)


@dataclass
class Operands:
    x: Tensor
    residual: Tensor
    norms: list[BatchNormArgs]  # of x, and of the residual
    dy: Tensor
    dy_alias: Tensor | None = None  # the gradient of the second handle, where there is one
    ghost: int | None = None

    def to(self, dtype: torch.dtype) -> "Operands":
        """The same values in another type, for the exact result; the vectors are copies, which a pass may update."""
        norms = [
            BatchNormArgs(*(v.detach().to(dtype, copy=True) if isinstance(v, Tensor) else v for v in norm))
            for norm in self.norms
        ]
        x, residual, dy = (t.detach().to(dtype) for t in (self.x, self.residual, self.dy))
        dy_alias = None if self.dy_alias is None else self.dy_alias.to(dtype)
        return Operands(x, residual, norms, dy, dy_alias, self.ghost)

    def fresh(self) -> "Operands":
        """A copy for one pass, which updates the running statistics."""
        norms = [
            BatchNormArgs(*(v.detach().clone() if isinstance(v, Tensor) else v for v in norm)) for norm in self.norms
        ]
        return replace(self, x=self.x.detach(), residual=self.residual.detach(), norms=norms)


def make_operands(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> Operands:
    generator = torch.Generator().manual_seed(len(case.name) + sum(case.shape) + case.seed)
    n_channels = case.shape[1]
    vector_dtype = dtype if case.vectors_as_x or dtype == torch.float64 else torch.float32

    def image(mean: float = 0.0, std: float = 1.0, layout: str = layout) -> Tensor:
        return arrange((mean + std * torch.randn(case.shape, generator=generator)).to(device, dtype), layout)

    def vector(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n_channels, generator=generator)).to(device, vector_dtype)

    residual_training = case.training if case.residual_training is None else case.residual_training
    norms = [
        BatchNormArgs(
            running_mean=vector(mean - 1, mean + 1) if case.running else None,
            running_var=vector(0.5, 2.0) if case.running else None,
            weight=vector(-1.5, 1.5) if case.affine else None,
            bias=vector(-1.0, 1.0) if case.affine else None,
            training=training,
            momentum=case.momentum / share,
            eps=case.eps * share,
        )
        for mean, training, share in ((case.mean, case.training, 1), (0.0, residual_training, 2))
    ]
    x, residual = image(case.mean, case.std), image(layout=case.residual_layout or layout)
    dy = image(std=case.dy_std, layout=case.dy_layout or layout)
    return Operands(x, residual, norms, dy, image(std=case.dy_std) if case.fork else None, case.ghost)


def ours(
    x: Tensor, residual: Tensor, norms: list[BatchNormArgs], join: str, relu: bool, backend: str, fork=False, ghost=None
):
    return batch_norm_add_relu(
        x,
        *norms[0],
        residual=None if join == "none" else residual,
        residual_norm=norms[1] if join == "bn" else None,
        relu=relu,
        fork=fork,
        backend=backend,
        ghost_batch_size=ghost,
    )


def eager(
    x: Tensor, residual: Tensor, norms: list[BatchNormArgs], join: str, relu: bool, backend: str = "", ghost=None
) -> Tensor:
    """With `ghost` images per group, group after group, as users would write it."""
    if ghost is not None:
        groups = zip(x.split(ghost), residual.split(ghost), strict=True)
        return torch.cat([eager(*group, norms, join, relu) for group in groups])
    y = F.batch_norm(x, *norms[0])
    if join == "bn":
        residual = F.batch_norm(residual, *norms[1])
    if join != "none":
        y = y + residual
    return F.relu(y) if relu else y


def results(
    operation, operands: Operands, join: str, relu: bool, backend: str = "", create_graph: bool = False
) -> dict[str, Tensor]:
    """y, every gradient and every running statistic after one forward and backward of `operation`."""
    operands = operands.fresh()
    leaves = {"x": operands.x, "residual": operands.residual}
    for prefix, norm in zip(("", "residual_"), operands.norms, strict=True):
        leaves |= {prefix + "weight": norm.weight, prefix + "bias": norm.bias}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    y = operation(operands.x, operands.residual, operands.norms, join, relu, backend)
    handles, dy = y if isinstance(y, tuple) else (y, y), (operands.dy, operands.dy_alias)
    n_handles = 1 if operands.dy_alias is None else 2
    gradients = torch.autograd.grad(
        handles[:n_handles], leaves.values(), dy[:n_handles], create_graph=create_graph, allow_unused=True
    )
    found = {"y": handles[0].detach()}
    found |= {f"d{name}": g.detach() for name, g in zip(leaves, gradients, strict=True) if g is not None}
    for prefix, norm in zip(("", "residual_"), operands.norms, strict=True):
        if norm.running_mean is not None:
            found |= {prefix + "running_mean": norm.running_mean, prefix + "running_var": norm.running_var}
    return found


def exact_results(operands: Operands, join: str, relu: bool, y: Tensor) -> dict[str, Tensor]:
    """`results` in fp64, of x - pivot, so that fp64 has digits to spare where |mean| is large.

    ReLU's gradient jumps at 0: it counts as closed where `y`, the result that is judged, is 0, else one element within
    a rounding of zero would count as an error of the whole dy. The gradients of two handles are added up in the type of
    the data, as autograd does.
    """
    dy = operands.dy if operands.dy_alias is None else operands.dy + operands.dy_alias
    exact = replace(operands, dy=dy.masked_fill(y <= 0, 0) if relu else dy, dy_alias=None).to(torch.float64)
    pivots = [x[:1, :, :1, :1].clone() for x in (exact.x, exact.residual)]
    if join != "bn":
        pivots[1].zero_()
    norms = [
        norm if norm.running_mean is None else norm._replace(running_mean=norm.running_mean - pivot.flatten())
        for norm, pivot in zip(exact.norms, pivots, strict=True)
    ]
    shifted = replace(exact, x=exact.x - pivots[0], residual=exact.residual - pivots[1], norms=norms)
    found = results(partial(eager, ghost=operands.ghost), shifted, join, relu=False)
    for name, pivot in zip(("running_mean", "residual_running_mean"), pivots, strict=True):
        if name in found:
            found[name] += pivot.flatten()
    return found | {"y": found["y"].relu()} if relu else found


def magnitudes(operands: Operands, join: str, closed: Tensor | None = None, roundings: float = 1) -> dict[str, Tensor]:
    """For every result that is a sum, the sum of its terms' magnitudes (the equations with absolute values).

    `closed`: where ReLU is; None for nowhere. `roundings`: how many each term has gone through. The mean of the batch,
    a sum itself, is rounded once more when it is stored.
    """
    if operands.ghost is not None:
        return _magnitudes_of_groups(operands, operands.ghost, join, closed, roundings)
    exact = operands.to(torch.float64)
    dy = exact.dy if exact.dy_alias is None else exact.dy + exact.dy_alias
    dz = (dy if closed is None else dy.masked_fill(closed, 0)).abs()
    found = {"y": roundings * exact.residual.abs() if join == "add" else torch.zeros_like(exact.x)}
    batch_norms = list(zip(("", "residual_"), (exact.x, exact.residual), exact.norms, strict=True))
    for prefix, x, norm in batch_norms if join == "bn" else batch_norms[:1]:
        mean, var = reference.statistics(x) if norm.training else (norm.running_mean, norm.running_var)
        rstd = channels((var + norm.eps).rsqrt())
        weight, bias = (1 if v is None else channels(v.abs()) for v in (norm.weight, norm.bias))
        deviation = (x - channels(mean)).abs()
        x_hat = deviation * rstd
        x_hat_terms = roundings * x_hat
        if norm.training:
            x_hat_terms = x_hat_terms + (roundings * deviation.mean(PER_CHANNEL, True) + channels(mean.abs())) * rstd
        dx = roundings * dz
        if norm.training:
            dx = dx + roundings * dz.mean(PER_CHANNEL, True)
            dx = dx + x_hat_terms * (dz * x_hat).mean(PER_CHANNEL, True)
            dx = dx + x_hat * (dz * x_hat_terms).mean(PER_CHANNEL, True)
        found["y"] = found["y"] + weight * x_hat_terms + (0 if norm.bias is None else roundings * bias)
        found["dresidual" if prefix else "dx"] = weight * rstd * dx
        found[f"d{prefix}weight"] = (dz * x_hat_terms).sum(PER_CHANNEL)
        found[f"d{prefix}bias"] = roundings * dz.sum(PER_CHANNEL)
        if norm.training and norm.running_mean is not None:
            old, new, n_rows = abs(1 - norm.momentum), abs(norm.momentum), x.numel() // x.shape[1]
            size = mean.abs() + deviation.mean(PER_CHANNEL)
            found[prefix + "running_mean"] = roundings * (old * norm.running_mean.abs() + new * size)
            found[prefix + "running_var"] = roundings * (old * norm.running_var + new * var * n_rows / (n_rows - 1))
    return found


def _magnitudes_of_groups(
    operands: Operands, ghost: int, join: str, closed: Tensor | None, roundings: float
) -> dict[str, Tensor]:
    """`magnitudes`, group after group: parameters' gradients add up, running statistics are handed on."""
    found: dict[str, list[Tensor]] = {}
    norms = operands.norms
    for start in range(0, len(operands.x), ghost):
        images = slice(start, start + ghost)
        group = Operands(
            operands.x[images],
            operands.residual[images],
            norms,
            operands.dy[images],
            None if operands.dy_alias is None else operands.dy_alias[images],
        )
        of_group = magnitudes(group, join, None if closed is None else closed[images], roundings)
        for name, size in of_group.items():
            found.setdefault(name, []).append(size)
        norms = [
            norm._replace(
                running_mean=of_group[prefix + "running_mean"] / roundings,
                running_var=of_group[prefix + "running_var"] / roundings,
            )
            if prefix + "running_mean" in of_group
            else norm
            for prefix, norm in zip(("", "residual_"), norms, strict=True)
        ]
    return {
        name: sizes[-1] if "running" in name else torch.cat(sizes) if sizes[0].dim() == 4 else torch.stack(sizes).sum(0)
        for name, sizes in found.items()
    }


def same_layout(tensor: Tensor, other: Tensor) -> bool:
    """Strides are equal, but for axes of one value, where they mean nothing."""
    return all(a == b or n == 1 for a, b, n in zip(tensor.stride(), other.stride(), tensor.shape, strict=True))


def assert_agrees(operands: Operands, join: str, relu: bool, roundings: float = 1, create_graph: bool = False) -> None:
    """Ours on the kernels against eager and fp64: y, every gradient and running statistic, within the budget.

    `roundings`: 1, typical of many values, or ROUNDINGS, whatever the values. `create_graph`: gradients of ours are
    taken such that they can be differentiated.
    """
    operation = partial(ours, fork=operands.dy_alias is not None, ghost=operands.ghost)
    found = results(operation, operands, join, relu, "triton", create_graph)
    expected = results(partial(eager, ghost=operands.ghost), operands, join, relu)
    assert found.keys() == expected.keys()
    assert same_layout(found["y"], F.batch_norm(operands.x, *operands.fresh().norms[0]))
    exact, of_eager = (exact_results(operands, join, relu, y["y"]) for y in (found, expected))
    if operands.x.dtype == torch.float64:  # `exact` has rounded as often
        roundings = ROUNDINGS
    added = magnitudes(operands, join, found["y"] <= 0 if relu else None, roundings)
    for name in found:
        assert_within_budget(name, found[name], expected[name], exact[name], added.get(name), of_eager[name])
