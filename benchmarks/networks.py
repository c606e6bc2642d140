"""Code that the training step and inference share: ResNet-18, its settings, and its tuning, compilation and graph."""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import Level, Provider, Run, Setting
from benchmarks.limits import precisions
from resnet_fast.ops.backend import cudnn_benchmark
from resnet_fast.profiling import providers
from resnet_fast.training import TrainConfig
from resnet_fast.training.graph import CudaGraph

RESNET18 = TrainConfig(model="resnet18", stem="cifar", device="cpu")
CASE = "ResNet-18, 3x3 stem"


def eager_resnet18() -> nn.Module:
    return providers.eager(RESNET18)


def fused_resnet18() -> nn.Module:
    return providers.fused(RESNET18)


def loaded(make_model: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    model = make_model()
    model.load_state_dict(weights, strict=True)
    return model


def on_cuda(setting: Setting, device: torch.device) -> str | None:
    """Return why a CUDA graph or max-autotune, which tunes for GPUs, cannot run on the device, or None."""
    return None if device.type == "cuda" else "runs only on CUDA"


def compiled(mode: str) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    return lambda model: torch.compile(model, mode=mode, dynamic=False)


def network_providers(run: Callable[..., Run]) -> dict[str, Provider]:
    """Return the providers of training and inference; `run` accepts make_model, tuned, compile_model and graph."""
    on_eager, on_fused = partial(run, eager_resnet18), partial(run, fused_resnet18)
    return {
        "eager, tuned": Provider(on_eager),
        "eager": Provider(partial(on_eager, tuned=False)),
        "eager, tuned, graph": Provider(partial(on_eager, graph=True), on_cuda, has_peak=False),
        "compile": Provider(partial(on_eager, compile_model=compiled("default")), slow_on=("cpu",)),
        "compile, max-autotune": Provider(
            partial(on_eager, compile_model=compiled("max-autotune")), on_cuda, slow_on=("cuda",), has_peak=False
        ),
        "fused": Provider(on_fused),
        "fused, graph": Provider(partial(on_fused, graph=True), on_cuda, has_peak=False),
    }


Batch = tuple[Tensor, ...]


class Data(NamedTuple):
    """The initial weights, on the CPU, and the batches, images first; the first batch is checked."""

    weights: dict[str, Tensor]
    batches: list[Batch]


class NetworkRun(Run):
    """A network that runs on its batches in rotation.

    Args:
        model: network with its weights and in its mode; it is moved to the batches' device.
        setting: gives the precision.
        batches: images, [N, 3, H, W], and further inputs of a run.
        tuned: whether to use channels_last, the setting's precision and cudnn.benchmark. Otherwise torch's defaults
            hold: NCHW, fp32.
        compile_model: wraps the model for its forward.
    """

    def __init__(
        self,
        model: nn.Module,
        setting: Setting,
        batches: list[Batch],
        tuned: bool = True,
        compile_model: Callable[[nn.Module], Any] = lambda model: model,
    ) -> None:
        self.tuned, self.precision = tuned, setting.precision if tuned else "fp32"
        layout = torch.channels_last if tuned else torch.contiguous_format
        self.model = model.to(device=batches[0][0].device, memory_format=layout)  # type: ignore[call-overload]
        batches = [(images.contiguous(memory_format=layout), *others) for images, *others in batches]
        self.batches = itertools.cycle(batches)
        self.forward = compile_model(self.model)
        self.recorded = batches[-1]  # not the first, which is checked, so that a replay has to read its inputs
        self.graph: CudaGraph[Tensor] | None = None

    def record(self) -> None:
        """Record a run as a CUDA graph, which later runs replay."""
        self.recorded = tuple(tensor.clone() for tensor in self.recorded)
        with cudnn_benchmark(self.tuned):
            self.graph = CudaGraph(lambda: self.run(*self.recorded))

    @abstractmethod
    def run(self, images: Tensor, *others: Tensor) -> Tensor:
        """Run on a batch."""

    def __call__(self) -> Tensor:
        batch = next(self.batches)
        if self.graph is not None:
            for recorded, tensor in zip(self.recorded, batch, strict=True):
                recorded.copy_(tensor)
            return self.graph()
        with cudnn_benchmark(self.tuned):
            return self.run(*batch)


class NetworkLevel(Level):
    """ResNet-18 on 32x32 images; times include the launches."""

    direction: str
    batch_sizes: Mapping[str, tuple[int, ...]]  # by device type
    quick_batch_sizes: Mapping[str, tuple[int, ...]]
    hide_launches = False
    image_size = 32

    def settings(self, device: torch.device, quick: bool) -> Iterator[Setting]:
        batch_sizes = (self.quick_batch_sizes if quick else self.batch_sizes)[device.type]
        for precision in precisions(device, quick):
            for batch_size in batch_sizes:
                yield Setting(CASE, self.direction, precision, "channels_last", batch_size)

    def random_images(self, setting: Setting, generator: torch.Generator) -> Tensor:
        """Return [N, 3, H, W] on the CPU, not zeros, on which a processor draws less power and clocks higher."""
        return torch.randn((setting.batch_size, 3, self.image_size, self.image_size), generator=generator)
