"""A BasicBlock, forward and backward: conv3x3 - BN+ReLU - conv3x3 - BN+add+ReLU, with and without a projection.

Device time: launches are hidden (see timing.alternate).
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.correctness import Tolerance
from benchmarks.harness import Level, Problem, Provider, Run, Setting
from benchmarks.limits import precisions
from benchmarks.networks import compiled, on_cuda
from benchmarks.replay import CLOCK
from benchmarks.work import STAGES, Work, flops, operation_bytes
from resnet_fast import FusedBatchNorm2d
from resnet_fast.evaluation.logits import DTYPES, autocast
from resnet_fast.models.resnet import BasicBlock
from resnet_fast.ops.backend import cudnn_benchmark
from resnet_fast.profiling.check import rounding_of
from resnet_fast.tuning.timing import rotation

# isort: split
from torchvision.models import resnet as torchvision_resnet

BATCH_SIZES = {"cpu": (16,), "cuda": (128, 512)}
N_ROUNDINGS = 12  # two convolutions, each with its operands and batch norm, forward and backward

IDENTITY = {f"BasicBlock {n_channels}x{width}x{width}": (n_channels, n_channels, width) for n_channels, width in STAGES}
PROJECTION = {
    f"BasicBlock {n_in}x{width}x{width}, stride 2": (n_in, n_out, width)
    for (n_in, width), (n_out, _) in itertools.pairwise(STAGES)
}


class Data(NamedTuple):
    """The block's initial weights, the (x, dy) whose results are checked, and an iterator over all sets."""

    weights: dict[str, Tensor]
    first: tuple[Tensor, Tensor]
    turn: Iterator[tuple[Tensor, Tensor]]


def make_block(
    block: type[nn.Module], norm: Callable[[int], nn.Module], n_in: int, n_out: int, width: int
) -> nn.Module:
    if n_in == n_out:
        return block(n_in, n_out, norm_layer=norm)
    projection = nn.Sequential(nn.Conv2d(n_in, n_out, 1, 2, bias=False), norm(n_out))
    return block(n_in, n_out, 2, projection, norm_layer=norm)


eager = partial(make_block, torchvision_resnet.BasicBlock, nn.BatchNorm2d)
fused = partial(make_block, BasicBlock, FusedBatchNorm2d)


class BlockRun(Run):
    """The block `make(*setting.shape)` in channels_last; bf16 and fp16 run under autocast."""

    def __init__(
        self,
        make: Callable[..., nn.Module],
        setting: Setting,
        data: Data,
        compile_model: Callable[[nn.Module], Any] = lambda model: model,
    ) -> None:
        self.block = make(*setting.shape).train()
        self.block.load_state_dict(data.weights, strict=True)
        self.block.to(data.first[0].device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward, self.precision, self.data = compile_model(self.block), setting.precision, data

    def __call__(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._run(*next(self.data.turn))

    def _run(self, x: Tensor, dy: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        with cudnn_benchmark(True):
            with autocast(x.device, self.precision):
                y = self.forward(x)
            return y, torch.autograd.grad(y, [x, *self.block.parameters()], dy.to(y.dtype))

    def observe(self) -> dict[str, Tensor]:
        return observe(self.block, *self._run(*self.data.first))


def observe(block: nn.Module, y: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names = ["x", *(name for name, _ in block.named_parameters())]
    results = {"y": y.detach()} | {f"d {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return results | {name: buffer.clone() for name, buffer in block.named_buffers()}


class BlockLevel(Level):
    name = "block"
    hide_launches = True
    rounds = {"cpu": 20, "cuda": 100}
    quick_rounds = {"cpu": 8, "cuda": 50}
    providers = {
        "eager": Provider(partial(BlockRun, eager)),
        "compile": Provider(partial(BlockRun, eager, compile_model=compiled("default")), slow_on=("cpu",)),
        "compile, max-autotune": Provider(
            partial(BlockRun, eager, compile_model=compiled("max-autotune-no-cudagraphs")), on_cuda, slow_on=("cuda",)
        ),
        "fused": Provider(partial(BlockRun, fused)),
    }

    def settings(self, device: torch.device, quick: bool) -> Iterator[Setting]:
        cases = list((IDENTITY | PROJECTION).items())
        if quick:
            cases = [next(iter(IDENTITY.items())), next(iter(PROJECTION.items()))]
        batch_sizes = BATCH_SIZES[device.type][-1:] if quick else BATCH_SIZES[device.type]
        for precision in precisions(device, quick):
            for batch_size in batch_sizes:
                for case, shape in cases:
                    yield Setting(case, "both", precision, "channels_last", batch_size, shape)

    def problem(self, setting: Setting, device: torch.device) -> Problem:
        generator = torch.Generator(device).manual_seed(torch.seed())  # fresh data in every run
        n_in, n_out, width = setting.shape
        width_out = width if n_in == n_out else width // 2
        dtype = DTYPES[setting.precision]

        def image(n_channels: int, width: int) -> Tensor:
            shape = (setting.batch_size, n_channels, width, width)
            values = torch.randn(shape, generator=generator, device=device).to(dtype)
            return values.contiguous(memory_format=torch.channels_last)

        n_sets = rotation(setting.batch_size * n_in * width**2 * dtype.itemsize, device)
        sets = [(image(n_in, width).requires_grad_(), image(n_out, width_out)) for _ in range(n_sets)]
        block = eager(*setting.shape)
        weights = copy.deepcopy(block.state_dict())
        block = block.to(device).double().train()
        x, dy = sets[0][0].detach().double().contiguous().requires_grad_(), sets[0][1].double().contiguous()
        y = block(x)
        exact = observe(block, y, torch.autograd.grad(y, [x, *block.parameters()], dy))
        rounding, n_elements = rounding_of(setting.precision, device), dy.numel()
        tolerance = Tolerance(rounding, N_ROUNDINGS, n_elements // n_out, n_elements)
        return Problem(Data(weights, sets[0], itertools.cycle(sets)), exact, tolerance)

    def work(self, setting: Setting) -> Work:
        n_in, n_out, width = setting.shape
        width_out = width if n_in == n_out else width // 2
        n_elements = setting.batch_size * n_out * width_out**2
        moved = operation_bytes("none", False, "both", n_elements, setting.item_size)
        moved += operation_bytes("add" if n_in == n_out else "bn", False, "both", n_elements, setting.item_size)
        return Work(moved, setting.batch_size * flops_per_image(*setting.shape))


@cache
def flops_per_image(n_in: int, n_out: int, width: int) -> float:
    return flops(lambda: eager(n_in, n_out, width), (2, n_in, width, width), input_needs_gradient=True) / 2


LEVEL = BlockLevel()


@pytest.mark.benchmark(timer=CLOCK)
def test_block(timed: Callable[[], None]) -> None:
    timed()
