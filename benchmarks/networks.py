"""The networks of the training step, and how blocks and steps are compiled, tuned and recorded as CUDA graphs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.harness import Setting
from resnet_fast.profiling import providers
from resnet_fast.training import TrainConfig

PRECISIONS = ["bf16", "fp32"]
RESNET18 = TrainConfig(model="resnet18", stem="cifar", device="cpu")


def eager_resnet18() -> nn.Module:
    return providers.eager(RESNET18)


def fused_resnet18() -> nn.Module:
    return providers.fused(RESNET18)


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
