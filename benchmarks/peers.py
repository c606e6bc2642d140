"""Other implementations of batch norm + add + ReLU, timed if they are installed. The project requires none of them."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# The joins that each module computes.
JOINS = {"attorch": ("none", "add"), "apex.contrib.groupbn.batch_norm": ("none", "add"), "timm.layers": ("none",)}


def why_not(module: str, join: str, precision: str, layout: str, device: torch.device) -> str | None:
    """Return why the peer cannot compute this, or None."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error})"
    if join not in JOINS[module]:
        return f"{module} has no such operation"
    if module != "timm.layers" and device.type != "cuda":
        return f"{module} runs only on CUDA"
    if module == "attorch" and precision == "bf16":
        return "attorch does not support bf16"
    if module.startswith("apex") and (precision, layout) != ("fp16", "channels_last"):
        return "apex's groupbn supports only fp16 in NHWC"
    return None


def attorch(n_channels: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    """Return a module with nn.BatchNorm2d's parameters and buffers, and a function that calls it on (x, residual)."""
    module: Any = importlib.import_module("attorch").BatchNorm2d(n_channels, act_func="relu")
    return module, lambda x, residual: module(x, residual)


def apex(n_channels: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    """Return the same for apex, whose tensors are [N, H, W, C]."""
    groupbn: Any = importlib.import_module("apex.contrib.groupbn.batch_norm")
    module = groupbn.BatchNorm2d_NHWC(n_channels, fuse_relu=True)

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        z = None if residual is None else residual.permute(0, 2, 3, 1)
        return module(x.permute(0, 2, 3, 1), z).permute(0, 3, 1, 2)

    return module, call


def timm(n_channels: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    """Return the same for timm, which has no residual."""
    module: Any = importlib.import_module("timm.layers").BatchNormAct2d(n_channels)
    return module, lambda x, residual: module(x)


PEERS = {
    "attorch": ("attorch", attorch),
    "apex": ("apex.contrib.groupbn.batch_norm", apex),
    "timm": ("timm.layers", timm),
}
