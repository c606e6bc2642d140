"""The whole training step of ResNet-18 (3x3 stem, 10 classes, 32x32 images): forward, loss, backward, SGD.

Launches count: a step is timed from an idle device until its last kernel has ended.

Numerics: in bf16 and fp16 the forward runs under autocast; weights, gradients and optimizer state are fp32. In fp16 the
loss is scaled by a GradScaler, whose arithmetic is part of the step. In channels_last eager's batch norm is cuDNN's in
fp16 and ATen's in bf16. In fp32 on a GPU cuDNN's convolutions round their inputs to TF32, torch's default, for every
provider.
"""

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.correctness import Tolerance
from benchmarks.harness import Problem, Provider, Setting
from benchmarks.networks import (
    Batch,
    Data,
    NetworkLevel,
    NetworkRun,
    eager_resnet18,
    fused_resnet18,
    loaded,
    network_providers,
    on_cuda,
)
from benchmarks.replay import CLOCK
from benchmarks.work import Work, flops, network_bytes
from resnet_fast.ops import choices, implementations
from resnet_fast.profiling.check import rounding_of
from resnet_fast.profiling.providers import N_BATCHES, N_CLASSES
from resnet_fast.profiling.settings import LEARNING_RATE
from resnet_fast.training.loss_scale import make_scaler
from resnet_fast.training.step import training_step

# Layers on the longest path between images and gradients: 17 convolutions and the linear one, forward and backward.
N_ROUNDINGS = 36

# Weight of each block's last norm, instead of 1. If blocks add little to their shortcuts, bf16's roundings grow less
# from layer to layer and mistakes stand out: a missing shortcut gradient is 3 times the tolerance, instead of 1.1.
BRANCH_WEIGHT = 0.2


class StepRun(NetworkRun):
    """A model in training, its optimizer and its batches.

    Args:
        make_model: makes the network.
        setting, tuned, compile_model: as in NetworkRun; tuned also selects the fused optimizer.
        data: weights and batches of images and labels.
        graph: whether to replay the step as a CUDA graph.
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
        super().__init__(loaded(make_model, data.weights).train(), setting, data.batches, tuned, compile_model)
        self.optimizer = make_optimizer(self.model, fused=True if tuned else None)
        self.scaler = make_scaler(self.precision, data.batches[0][0].device)
        self.scale = self.scaler.get_scale()
        if graph:
            self.record()

    def record(self) -> None:
        """Record the step, and undo what its warm-up did to weights, statistics, momentum and loss scale."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        scaler = self.scaler.state_dict()
        super().record()
        self.scaler.load_state_dict(scaler)
        self.model.load_state_dict(before, strict=True)
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()  # the first step adds its gradient to 0.9 · 0

    def run(self, images: Tensor, *others: Tensor) -> Tensor:
        (labels,) = others
        return training_step(self.forward, self.optimizer, images, labels, self.precision, self.scaler)[0]

    def observe(self) -> dict[str, Tensor]:
        before = copy.deepcopy(list(self.model.parameters()))
        return observe(self.model, self(), before)

    def finish(self) -> None:
        loss = self().item()
        if not torch.isfinite(torch.tensor(loss)):
            raise RuntimeError(f"the loss must be finite after the timed steps, got {loss}")
        if self.scaler.get_scale() < self.scale:
            raise RuntimeError("gradients overflowed in fp16, so a timed step was skipped")


def observe(model: nn.Module, loss: Tensor, before: list[nn.Parameter]) -> dict[str, Tensor]:
    """Return the loss, every gradient (zeros if there is none), every parameter's update, and every buffer."""
    results = {"loss": loss.clone()}
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        results[f"d {name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        results[f"d {name}, step"] = (parameter - old).detach()
    return results | {name: buffer.clone() for name, buffer in model.named_buffers()}


def make_optimizer(model: nn.Module, fused: bool | None) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=fused
    )


def exact_first_step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return a first step's results in fp64, and in NCHW, because cuDNN has few fp64 convolutions in channels_last."""
    images, labels = batch
    model = copy.deepcopy(model).to(device=images.device, dtype=torch.float64).train()
    before = copy.deepcopy(list(model.parameters()))
    loss = F.cross_entropy(model(images.double().contiguous()), labels)
    loss.backward()
    make_optimizer(model, fused=None).step()
    return observe(model, loss.detach(), before)


def tuned(setting: Setting, device: torch.device) -> Mapping[implementations.Problem, implementations.Choice]:
    """Return what `resnet-fast tune` has chosen on this GPU for the setting."""
    entries = choices.table(device).items()
    key = (setting.precision, setting.batch_size)
    return {problem: choice for problem, choice in entries if (problem.dtype, problem.n_images) == key}


def tuned_why_not(setting: Setting, device: torch.device) -> str | None:
    if (reason := on_cuda(setting, device)) is not None:
        return reason
    if setting.precision not in implementations.DTYPES.values():
        return f"there are no choices in {setting.precision}"
    if tuned(setting, device):
        return None
    return f"not tuned: run resnet-fast tune --batch-size {setting.batch_size} --precision {setting.precision}"


class StepLevel(NetworkLevel):
    name = "training_step"
    direction = "step"
    batch_sizes = {"cpu": (32,), "cuda": (128, 512, 1024)}
    quick_batch_sizes = {"cpu": (8,), "cuda": (128, 512)}
    rounds = {"cpu": 40, "cuda": 100}
    quick_rounds = {"cpu": 8, "cuda": 30}
    providers = {
        **network_providers(StepRun),
        "fused, chosen": Provider(partial(StepRun, fused_resnet18), tuned_why_not, entries=tuned),
        "fused, chosen, graph": Provider(
            partial(StepRun, fused_resnet18, graph=True), tuned_why_not, has_peak=False, entries=tuned
        ),
    }

    def problem(self, setting: Setting, device: torch.device) -> Problem:
        generator = torch.Generator().manual_seed(torch.seed())  # fresh data in every run

        def batch() -> Batch:
            images = self.random_images(setting, generator)
            return images.to(device), torch.randint(N_CLASSES, images.shape[:1], generator=generator).to(device)

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
        return Work(network_bytes(setting.batch_size, setting.item_size), setting.batch_size * flops_per_image())


@cache
def flops_per_image() -> float:
    return flops(eager_resnet18, (2, 3, 32, 32), input_needs_gradient=False) / 2


LEVEL = StepLevel()


@pytest.mark.benchmark(timer=CLOCK)
def test_training_step(timed: Callable[[], None]) -> None:
    timed()
