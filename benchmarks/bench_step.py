"""The whole training step of ResNet-18 (3x3 stem, 10 classes, 32x32 images): forward, loss, backward, SGD.

Launches count: a step is timed from an idle device until its last kernel has ended.

Numerics: in bf16 the forward runs under autocast; weights, gradients and optimizer state are fp32. In fp32 on a GPU
cuDNN's convolutions round their inputs to TF32, torch's default, for every provider alike.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.correctness import Tolerance
from benchmarks.harness import Level, Problem, Provider, Run, Setting
from benchmarks.networks import (
    PRECISIONS,
    compiled,
    cudnn_benchmark,
    eager_resnet18,
    fused_resnet18,
    on_cuda,
)
from benchmarks.replay import CLOCK
from benchmarks.work import Work, flops, network_bytes
from resnet_fast.profiling.check import rounding_of
from resnet_fast.profiling.measure import LEARNING_RATE
from resnet_fast.profiling.providers import N_BATCHES, N_CLASSES
from resnet_fast.training.graph import CudaGraph
from resnet_fast.training.step import training_step

BATCH_SIZES = {"cpu": (32,), "cuda": (128, 512, 1024)}
CASE = "ResNet-18, 3x3 stem"
# Layers on the longest path between images and gradients: 17 convolutions and the linear one, forward and backward.
N_ROUNDINGS = 36

# Of the last norm of a block, instead of 1. With blocks that add little to their shortcuts bf16's roundings grow less
# from layer to layer, and a mistake stands out: a shortcut without its gradient is 3 times what is allowed, not 1.1.
BRANCH_WEIGHT = 0.2

Batch = tuple[Tensor, Tensor]


class Data(NamedTuple):
    """The initial weights, on the CPU, and the batches, of which the first is checked."""

    weights: dict[str, Tensor]
    batches: list[Batch]


class StepRun(Run):
    """A model, its optimizer and its batches.

    Args:
        make_model: the network.
        tuned: channels_last, the setting's precision, cudnn.benchmark, the fused optimizer; else what a user has who
            sets nothing: NCHW, fp32, and torch's defaults.
        compile_model: wraps the model for its forward.
        graph: replay the step as a CUDA graph.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        setting: Setting,
        data: Data,
        tuned: bool = True,
        compile_model: Callable[[nn.Module], Any] = lambda model: model,
        graph: bool = False,
    ) -> None:
        self.tuned, self.precision = tuned, setting.precision if tuned else "fp32"
        self.model = make_model().train()
        self.model.load_state_dict(data.weights, strict=True)
        layout = torch.channels_last if tuned else torch.contiguous_format
        self.model.to(device=data.batches[0][0].device, memory_format=layout)  # type: ignore[call-overload]
        batches = [(images.contiguous(memory_format=layout), labels) for images, labels in data.batches]
        self.batches = itertools.cycle(batches)
        self.optimizer = make_optimizer(self.model, fused=True if tuned else None)
        self.forward = compile_model(self.model)
        self.graph: CudaGraph[Tensor] | None = None
        if graph:
            self._record(*batches[0])

    def _record(self, images: Tensor, labels: Tensor) -> None:
        """Record the step, and undo what the steps before did to weights, running statistics and momentum."""
        self.images, self.labels = images.clone(), labels.clone()
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        with cudnn_benchmark(True):
            self.graph = CudaGraph(lambda: self._step(self.images, self.labels))
        self.model.load_state_dict(before, strict=True)
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()  # which the first step multiplies and adds its gradient to

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        return training_step(self.forward, self.optimizer, images, labels, self.precision)[0]

    def __call__(self) -> Tensor:
        images, labels = next(self.batches)
        if self.graph is not None:
            self.images.copy_(images)
            self.labels.copy_(labels)
            return self.graph()
        with cudnn_benchmark(self.tuned):
            return self._step(images, labels)

    def observe(self) -> dict[str, Tensor]:
        before = copy.deepcopy(list(self.model.parameters()))
        return observe(self.model, self(), before)

    def finish(self) -> None:
        loss = self().item()
        if not torch.isfinite(torch.tensor(loss)):
            raise RuntimeError(f"the loss became {loss}: what was timed is no training step")


def observe(model: nn.Module, loss: Tensor, before: list[nn.Parameter]) -> dict[str, Tensor]:
    """The loss, every gradient, what the optimizer made of it, and every buffer; zeros for a gradient there is not."""
    found = {"loss": loss.clone()}
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        found[f"d {name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        found[f"d {name}, step"] = (parameter - old).detach()
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def make_optimizer(model: nn.Module, fused: bool | None) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=fused
    )


def exact_first_step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """In fp64, and NCHW, because cuDNN has few fp64 convolutions in channels_last."""
    images, labels = batch
    model = copy.deepcopy(model).to(device=images.device, dtype=torch.float64).train()
    before = copy.deepcopy(list(model.parameters()))
    loss = F.cross_entropy(model(images.double().contiguous()), labels)
    loss.backward()
    make_optimizer(model, fused=None).step()
    return observe(model, loss.detach(), before)


class StepLevel(Level):
    name = "training_step"
    hide_launches = False
    rounds = {"cpu": 40, "cuda": 100}
    quick_rounds = {"cpu": 8, "cuda": 30}
    image_size = 32
    providers = {
        "eager, tuned": Provider(partial(StepRun, eager_resnet18)),
        "eager": Provider(partial(StepRun, eager_resnet18, tuned=False)),
        "eager, tuned, graph": Provider(partial(StepRun, eager_resnet18, graph=True), on_cuda, has_peak=False),
        "compile": Provider(partial(StepRun, eager_resnet18, compile_model=compiled("default")), slow_on=("cpu",)),
        "compile, max-autotune": Provider(
            partial(StepRun, eager_resnet18, compile_model=compiled("max-autotune")),
            on_cuda,
            slow_on=("cuda",),
            has_peak=False,
        ),
        "fused": Provider(partial(StepRun, fused_resnet18)),
        "fused, graph": Provider(partial(StepRun, fused_resnet18, graph=True), on_cuda, has_peak=False),
    }

    def settings(self, device: torch.device, quick: bool) -> Iterator[Setting]:
        batch_sizes = BATCH_SIZES[device.type]
        if quick and device.type == "cuda":
            batch_sizes = batch_sizes[:2]
        for precision in PRECISIONS[:1] if quick else PRECISIONS:
            for batch_size in batch_sizes:
                yield Setting(CASE, "step", precision, "channels_last", batch_size)

    def problem(self, setting: Setting, device: torch.device) -> Problem:
        generator = torch.Generator().manual_seed(torch.seed())  # fresh data in every run
        shape = (setting.batch_size, 3, self.image_size, self.image_size)

        def batch() -> Batch:
            # Never zeros, on which a processor draws less power and clocks higher.
            images = torch.randn(shape, generator=generator)
            return images.to(device), torch.randint(N_CLASSES, shape[:1], generator=generator).to(device)

        model, batches = eager_resnet18(), [batch() for _ in range(N_BATCHES)]
        for name, parameter in model.named_parameters():
            if name.endswith("bn2.weight"):
                nn.init.constant_(parameter, BRANCH_WEIGHT)
        exact = exact_first_step(model, batches[0])
        # The last stage has the fewest values, the first the longest sums.
        n_rows, n_elements = (
            setting.batch_size * self.image_size**2,
            512 * setting.batch_size * (self.image_size // 8) ** 2,
        )
        tolerance = Tolerance(rounding_of(setting.precision, device), N_ROUNDINGS, n_rows, n_elements)
        return Problem(Data(model.state_dict(), batches), exact, tolerance)

    def work(self, setting: Setting) -> Work:
        item_size = 2 if setting.precision == "bf16" else 4
        return Work(network_bytes(setting.batch_size, item_size), setting.batch_size * flops_per_image())


@cache
def flops_per_image() -> float:
    return flops(eager_resnet18, (2, 3, 32, 32), input_needs_gradient=False) / 2


LEVEL = StepLevel()


@pytest.mark.benchmark(timer=CLOCK)
def test_training_step(timed: Callable[[], None]) -> None:
    timed()
