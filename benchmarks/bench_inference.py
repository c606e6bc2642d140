"""The forward pass of ResNet-18 (3x3 stem, 10 classes, 32x32 images) in evaluation mode, without gradients.

Launches count: a pass is timed from an idle device until its last kernel has ended.

Numerics: in bf16 and fp16 the pass runs under autocast, as in `resnet_fast.evaluation`, and rounds the fp32 weights
every time. In fp32 on a GPU cuDNN's convolutions round their inputs to TF32, torch's default, for every provider.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.correctness import Tolerance
from benchmarks.harness import Problem, Provider, Setting
from benchmarks.networks import (
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
from benchmarks.work import Work, inference_work
from resnet_fast import fold_batch_norm
from resnet_fast.evaluation import autocast
from resnet_fast.profiling.check import rounding_of
from resnet_fast.profiling.providers import N_BATCHES

N_ROUNDINGS = 18  # layers on the longest path: 17 convolutions and the linear one
N_TERMS = 9 * 512  # in a convolution's longest sums


class InferenceRun(NetworkRun):
    """A model in evaluation mode and its batches of images.

    Args:
        make_model: makes the network.
        setting, tuned, compile_model: as in NetworkRun.
        data: weights and batches.
        prepare: changes the model after its weights are loaded.
        graph: whether to replay the pass as a CUDA graph.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        setting: Setting,
        data: Data,
        tuned: bool = True,
        compile_model: Callable[[nn.Module], Any] = lambda model: model,
        prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
        graph: bool = False,
    ) -> None:
        model = prepare(loaded(make_model, data.weights).eval())
        super().__init__(model, setting, data.batches, tuned, compile_model)
        if graph:
            self.record()

    @torch.inference_mode()
    def run(self, images: Tensor, *others: Tensor) -> Tensor:
        with autocast(images.device, self.precision):
            return self.forward(images)

    def observe(self) -> dict[str, Tensor]:
        return {"logits": self().clone()}  # the next replay of a graph overwrites them


def randomize_norms(model: nn.Module, generator: torch.Generator) -> None:
    """Give every batch norm random parameters and statistics, because a new network's have almost no effect."""

    def uniform(low: float, high: float, like: Tensor) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.weight.data = uniform(0.5, 1.5, norm.weight)
            norm.bias.data = uniform(-0.3, 0.3, norm.bias)
            norm.running_mean = uniform(-0.5, 0.5, norm.running_mean)
            norm.running_var = uniform(0.5, 2.0, norm.running_var)


@torch.inference_mode()
def exact_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return logits in fp64, and in NCHW, because cuDNN has few fp64 convolutions in channels_last."""
    model = copy.deepcopy(model).to(device=images.device, dtype=torch.float64).eval()
    return model(images.double().contiguous())


class InferenceLevel(NetworkLevel):
    name = "inference"
    direction = "forward"
    batch_sizes = {"cpu": (1, 64), "cuda": (1, 512)}
    quick_batch_sizes = {"cpu": (1, 16), "cuda": (1, 512)}
    rounds = {"cpu": 40, "cuda": 100}
    quick_rounds = {"cpu": 8, "cuda": 30}
    providers = {
        **network_providers(InferenceRun),
        "folded": Provider(partial(InferenceRun, fused_resnet18, prepare=fold_batch_norm)),
        "folded, graph": Provider(
            partial(InferenceRun, fused_resnet18, prepare=fold_batch_norm, graph=True), on_cuda, has_peak=False
        ),
    }

    def problem(self, setting: Setting, device: torch.device) -> Problem:
        generator = torch.Generator().manual_seed(torch.seed())  # fresh data in every run
        model = eager_resnet18()
        randomize_norms(model, generator)

        def images() -> Tensor:
            # Each image has its own color, so that the logits of a wrong image stand out.
            colors = torch.randn((setting.batch_size, 3, 1, 1), generator=generator)
            return (self.random_images(setting, generator) + colors).to(device)

        data = Data(model.state_dict(), [(images(),) for _ in range(N_BATCHES)])
        exact = {"logits": exact_logits(model, data.batches[0][0])}
        return Problem(data, exact, Tolerance(rounding_of(setting.precision, device), N_ROUNDINGS, N_TERMS))

    def work(self, setting: Setting) -> Work:
        return inference_work(eager_resnet18, setting.batch_size, setting.item_size)


LEVEL = InferenceLevel()


@pytest.mark.benchmark(timer=CLOCK)
def test_inference(timed: Callable[[], None]) -> None:
    timed()
