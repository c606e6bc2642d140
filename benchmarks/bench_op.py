"""The fused operation alone, at ResNet-18's stage shapes: batch norm + residual + ReLU, and its gradients.

Device time: launches are hidden (see timing.alternate). Inputs rotate through more memory than the L2 cache holds.
"""

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.correctness import Tolerance
from benchmarks.harness import Level, Problem, Provider, Run, Setting
from benchmarks.limits import precisions
from benchmarks.networks import on_cuda
from benchmarks.replay import CLOCK
from benchmarks.work import STAGES, Work, operation_bytes
from resnet_fast.evaluation.logits import DTYPES
from resnet_fast.functional import BatchNormArgs, batch_norm_add_relu
from resnet_fast.ops import implementations
from resnet_fast.ops.implementations import Choice
from resnet_fast.profiling.check import rounding_of
from resnet_fast.tuning.timing import rotation

LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
BATCH_SIZES = {"cpu": (16,), "cuda": (128, 512)}
# Batch norm, the addition and ReLU, forward and backward.
N_ROUNDINGS = 6


class Operation(NamedTuple):
    """relu(bn(x) + residual); join is "none", "add" or "bn"; with a fork, y has two consumers."""

    join: str
    fork: bool = False


OPERATIONS = {
    "BN+ReLU": Operation("none"),
    "BN+add+ReLU": Operation("add"),
    "BN+BN+add+ReLU": Operation("bn"),
    "BN+add+ReLU, forked": Operation("add", fork=True),
}


@dataclass
class Inputs:
    """x, residual, dy and at a fork the second consumer's dy, all [N, C, H, W]."""

    x: Tensor
    residual: Tensor | None
    dys: tuple[Tensor, ...]


@dataclass
class Data:
    """Sets of inputs, the first of which is checked, and both norms' weight and bias, [C].

    All providers rotate through the sets together, so that none finds the previous provider's inputs in a cache.
    """

    operation: Operation
    sets: list[Inputs]
    affine: list[tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        self.turn = itertools.cycle(range(len(self.sets)))


Norms = list[BatchNormArgs]
Outputs = tuple[Tensor, ...]  # y, and its alias if it is forked
Function = Callable[[Operation, Tensor, Tensor | None, Norms], Outputs]


def before_relu(operation: Operation, x: Tensor, residual: Tensor | None, norms: Norms) -> Tensor:
    y = F.batch_norm(x, *norms[0])
    if residual is not None:
        y += residual if operation.join == "add" else F.batch_norm(residual, *norms[1])
    return y


def eager(operation: Operation, x: Tensor, residual: Tensor | None, norms: Norms) -> Outputs:
    """Run the operation as torchvision's blocks do."""
    y = F.relu(before_relu(operation, x, residual, norms), inplace=True)
    return (y, y.view_as(y)) if operation.fork else (y,)


def fused(operation: Operation, x: Tensor, residual: Tensor | None, norms: Norms) -> Outputs:
    joined = norms[1] if operation.join == "bn" else None
    y = batch_norm_add_relu(x, *norms[0], residual=residual, residual_norm=joined, fork=operation.fork)
    return y if operation.fork else (y,)


def fused_apart(operation: Operation, x: Tensor, residual: Tensor | None, norms: Norms) -> Outputs:
    """Run it without the savings of fork and bn join: autograd adds gradients, and the shortcut's norm is separate."""
    if residual is not None and operation.join == "bn":
        residual = batch_norm_add_relu(residual, *norms[1], relu=False)
    y = batch_norm_add_relu(x, *norms[0], residual=residual)
    return (y, y.view_as(y)) if operation.fork else (y,)


class OpRun(Run):
    """`function` with its own norms."""

    def __init__(self, function: Function, setting: Setting, data: Data) -> None:
        self.function, self.direction, self.data = function, setting.direction, data
        self.norms = [fresh_norm(*affine) for affine in data.affine]
        self.prepared: list[Callable[[], object]] = []

    def __call__(self) -> object:
        if not self.prepared:  # after `observe`, which comes first
            self.prepared = [self._prepared(inputs) for inputs in self.data.sets]
        return self.prepared[next(self.data.turn)]()

    def _prepared(self, inputs: Inputs) -> Callable[[], object]:
        if self.direction == "forward":
            return partial(self._forward, inputs)
        if self.direction == "both":
            return lambda: self._backward(self._forward(inputs), inputs)
        outputs = self._forward(inputs)
        return lambda: self._backward(outputs, inputs, retain_graph=True)

    def _forward(self, inputs: Inputs) -> Outputs:
        return self.function(self.data.operation, inputs.x, inputs.residual, self.norms)

    def _backward(self, outputs: Outputs, inputs: Inputs, retain_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, self._differentiable(inputs), inputs.dys, retain_graph=retain_graph)

    def _differentiable(self, inputs: Inputs) -> list[Tensor]:
        tensors = [inputs.x, inputs.residual]
        for norm in self.norms:
            tensors += [norm.weight, norm.bias]
        return [tensor for tensor in tensors if tensor is not None]

    def observe(self) -> dict[str, Tensor]:
        inputs = self.data.sets[0]
        outputs = self._forward(inputs)
        results = {"y": outputs[0].detach().clone()}
        results |= {f"gradient {i}": gradient for i, gradient in enumerate(self._backward(outputs, inputs))}
        for i, norm in enumerate(self.norms):
            assert norm.running_mean is not None and norm.running_var is not None
            results |= {f"running_mean {i}": norm.running_mean.clone(), f"running_var {i}": norm.running_var.clone()}
        return results


def fresh_norm(weight: Tensor, bias: Tensor) -> BatchNormArgs:
    """Return a batch norm in training mode, with running statistics of 0 and 1 and with its own parameters."""
    parameters = (weight.clone().requires_grad_(), bias.clone().requires_grad_())
    return BatchNormArgs(torch.zeros_like(weight), torch.ones_like(weight), *parameters, training=True)


class ChosenRun(OpRun):
    """The fused operation with the implementation that the table of choices names.

    Args:
        is_it: tells from a launch's kernel name and arguments whether it belongs to the implementation.
        setting, data: as in OpRun.
    """

    def __init__(self, is_it: "IsIt", setting: Setting, data: Data) -> None:
        super().__init__(fused, setting, data)
        self.is_it = is_it

    def observe(self) -> dict[str, Tensor]:
        with launches() as launched:
            results = super().observe()
        n_own = sum(self.is_it(name, arguments) for name, arguments in launched)
        if n_own != 2:  # forward and backward
            raise RuntimeError(f"forward and backward must both run as chosen, got {n_own} chosen launches")
        return results


IsIt = Callable[[str, dict[str, Any]], bool]


@contextmanager
def launches() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Collect the names and arguments of launched kernels."""
    from resnet_fast.ops import launch  # imports triton, without which there is no choice

    launched, original = [], launch.launch_kernel

    def noted(kernel: Any, *others: Any, **arguments: Any) -> None:
        launched.append((kernel.fn.__name__, arguments))
        original(kernel, *others, **arguments)

    launch.launch_kernel = noted
    try:
        yield launched
    finally:
        launch.launch_kernel = original


def is_reversed(kernel: str, arguments: dict[str, Any]) -> bool:
    return bool(arguments.get("REVERSED"))


def is_single_read(kernel: str, arguments: dict[str, Any]) -> bool:
    return kernel.startswith("single_read")


def choice_problems(setting: Setting) -> list[implementations.Problem]:
    """Return the setting's keys in the table of choices: forward, which a fork does not change, and backward."""
    operation, n_channels = operation_of(setting), setting.shape[0]
    key = (setting.precision, setting.batch_size, n_channels, n_channels, setting.shape[1], operation.join)
    return [
        implementations.Problem("batch norm", *key),
        implementations.Problem("batch norm backward", *key, operation.fork),
    ]


def chosen(implementation: str, is_it: IsIt) -> Provider:
    """Return a provider that runs both directions of the operation as `implementation` (ops/implementations.py)."""

    def entries(setting: Setting, device: torch.device) -> dict[implementations.Problem, Choice]:
        return dict.fromkeys(choice_problems(setting), Choice(implementation))

    def why_not(setting: Setting, device: torch.device) -> str | None:
        if (reason := on_cuda(setting, device)) is not None:
            return reason
        if setting.precision not in implementations.DTYPES.values() or setting.layout != "channels_last":
            return "choices need a 16-bit type and channels_last"
        if implementation == "single read" and not fits_single_read(setting, device):
            return "does not fit into the registers of the GPU"
        return None

    return Provider(partial(ChosenRun, is_it), why_not, entries=entries)


def fits_single_read(setting: Setting, device: torch.device) -> bool:
    single_read: Any = importlib.import_module("resnet_fast.ops.single_read")  # imports triton
    shape, dtype = (setting.batch_size, *setting.shape), DTYPES[setting.precision]
    x = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    return all(single_read.fits(x, problem.operation, problem.join) for problem in choice_problems(setting))


def build_compiled(mode: str, setting: Setting, data: Data) -> OpRun:
    return OpRun(torch.compile(eager, mode=mode, dynamic=False, fullgraph=True), setting, data)


def build_peer(make: Callable, setting: Setting, data: Data) -> OpRun:
    module, call = make(setting.shape[0])
    module.to(data.sets[0].x.device)

    def function(operation: Operation, x: Tensor, residual: Tensor | None, norms: Norms) -> Outputs:
        return (call(x, residual),)

    run = OpRun(function, setting, data)
    norm = run.norms[0]
    for name in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(norm, name)
        setattr(module, name, torch.nn.Parameter(tensor) if tensor.requires_grad else tensor)
    run.norms = [norm._replace(weight=module.weight, bias=module.bias)]
    return run


def peer_why_not(module: str, setting: Setting, device: torch.device) -> str | None:
    operation = operation_of(setting)
    if operation.fork:
        return "the peers' operations have no fork"
    return peers.why_not(module, operation.join, setting.precision, setting.layout, device)


def apart_why_not(setting: Setting, device: torch.device) -> str | None:
    operation = operation_of(setting)
    if device.type == "cpu":
        return "on a CPU nothing is fused"
    return None if operation.fork or operation.join == "bn" else "neither a fork nor a bn join to take apart"


def operation_of(setting: Setting) -> Operation:
    return OPERATIONS[setting.case.rpartition(" ")[0]]


class OpLevel(Level):
    name = "op"
    hide_launches = True
    rounds = {"cpu": 20, "cuda": 100}
    quick_rounds = {"cpu": 8, "cuda": 50}
    providers = {
        "eager": Provider(partial(OpRun, eager)),
        "compile": Provider(partial(build_compiled, "default"), slow_on=("cpu",)),
        "compile, max-autotune": Provider(
            partial(build_compiled, "max-autotune-no-cudagraphs"), on_cuda, slow_on=("cuda",)
        ),
        "fused": Provider(partial(OpRun, fused)),
        "fused, two passes reversed": chosen("two passes, reversed", is_reversed),
        "fused, single read": chosen("single read", is_single_read),
        "fused, apart": Provider(partial(OpRun, fused_apart), apart_why_not),
        **{
            name: Provider(partial(build_peer, make), partial(peer_why_not, module))
            for name, (module, make) in peers.PEERS.items()
        },
    }

    def settings(self, device: torch.device, quick: bool) -> Iterator[Setting]:
        layouts = ["channels_last"] if quick else list(LAYOUTS)
        directions = ["both"] if quick else ["forward", "backward", "both"]
        operations = {name: operation for name, operation in OPERATIONS.items() if not (quick and operation.fork)}
        for precision, layout, direction in itertools.product(precisions(device, quick), layouts, directions):
            for batch_size in BATCH_SIZES[device.type][-1:] if quick else BATCH_SIZES[device.type]:
                for (name, operation), (n_channels, width) in itertools.product(operations.items(), STAGES):
                    if not (operation.fork and direction == "forward"):
                        case = f"{name} {n_channels}x{width}x{width}"
                        yield Setting(case, direction, precision, layout, batch_size, (n_channels, width, width))

    def problem(self, setting: Setting, device: torch.device) -> Problem:
        operation, n_channels = operation_of(setting), setting.shape[0]
        generator = torch.Generator(device).manual_seed(torch.seed())  # fresh data in every run
        dtype, memory_format = DTYPES[setting.precision], LAYOUTS[setting.layout]

        def image() -> Tensor:
            values = torch.randn(setting.batch_size, *setting.shape, generator=generator, device=device)
            return values.to(dtype).contiguous(memory_format=memory_format)

        def vector() -> Tensor:
            return torch.rand(n_channels, generator=generator, device=device) + 0.5

        def inputs() -> Inputs:
            residual = (0.5 + image()).requires_grad_() if operation.join != "none" else None
            return Inputs((1 + 2 * image()).requires_grad_(), residual, tuple(dys()))

        def dys() -> Iterator[Tensor]:
            for _ in range(1 + operation.fork):
                yield image()

        first = inputs()
        n_sets = rotation(first.x.nbytes, device)
        affine = [(vector(), vector() - 1) for _ in range(1 + (operation.join == "bn"))]
        data = Data(operation, [first, *(inputs() for _ in range(n_sets - 1))], affine)
        rounding = rounding_of(setting.precision, torch.device("cpu"))  # no product here, so no TF32
        n_rows = first.x.numel() // n_channels
        return Problem(data, exact(data, rounding), Tolerance(rounding, N_ROUNDINGS, n_rows))

    def work(self, setting: Setting) -> Work:
        operation = operation_of(setting)
        n_elements = setting.batch_size * math.prod(setting.shape)
        item_size = DTYPES[setting.precision].itemsize
        return Work(operation_bytes(operation.join, operation.fork, setting.direction, n_elements, item_size))


def exact(data: Data, rounding: float) -> dict[str, Tensor]:
    """Return eager's results in fp64 for the first set.

    Set its dy to 0 where ReLU's input is within some roundings of 0, because there providers may differ in ReLU's
    gradient and all be right.
    """
    first = data.sets[0]
    double = Inputs(
        first.x.detach().double().requires_grad_(),
        None if first.residual is None else first.residual.detach().double().requires_grad_(),
        tuple(dy.double() for dy in first.dys),
    )
    run = OpRun(eager, Setting("", "both", "", "", 0), Data(data.operation, [double], _double(data.affine)))
    with torch.no_grad():
        norms = [fresh_norm(*affine) for affine in _double(data.affine)]
        z = before_relu(data.operation, double.x, double.residual, norms)
        n_rows = z.numel() // z.shape[1]
        near = z.abs() < 16 * (rounding + math.sqrt(n_rows) * 2.0**-24)
        for dy, wide in zip(first.dys, double.dys, strict=True):
            dy.masked_fill_(near, 0)
            wide.masked_fill_(near, 0)
    return run.observe()


def _double(affine: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(weight.double(), bias.double()) for weight, bias in affine]


LEVEL = OpLevel()


@pytest.mark.benchmark(timer=CLOCK)
def test_op(timed: Callable[[], None]) -> None:
    timed()
