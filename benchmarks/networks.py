"""The networks of the training step, and how blocks and steps are compiled, tuned and recorded as CUDA graphs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import resnet_fast  # before torchvision, which it lets import beside a CPU build of torch
from resnet_fast.models.resnet import give_cifar_stem

# isort: split
from torchvision.models import resnet18 as torchvision_resnet18

from benchmarks.harness import Setting

N_CLASSES = 10
PRECISIONS = ["bf16", "fp32"]


def eager_resnet18() -> nn.Module:
    """torchvision's ResNet-18, with the stem changed as its users change it."""
    model = torchvision_resnet18(num_classes=N_CLASSES)
    give_cifar_stem(model)
    return model


def fused_resnet18() -> nn.Module:
    return resnet_fast.resnet18(stem="cifar", num_classes=N_CLASSES)


def on_cuda(setting: Setting, device: torch.device) -> str | None:
    """CUDA graphs are CUDA's, and max-autotune tunes for GPUs."""
    return None if device.type == "cuda" else "runs on CUDA alone"


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Whether cuDNN tries its algorithms for a new shape; a global flag, of which providers want different values."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def compiled(mode: str) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    return lambda model: torch.compile(model, mode=mode, dynamic=False)


class Graph:
    """A call, recorded as a CUDA graph and replayed.

    The call must read its inputs from tensors that stay, and leave its results in such: a replay runs the same kernels
    on the same addresses.
    """

    def __init__(self, call: Callable[[], Tensor]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compilation, cuDNN's choice of algorithms and the optimizer's state, none in the graph
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = call()

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.result
