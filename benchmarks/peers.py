"""Other implementations of batch norm + add + ReLU, timed where they are installed.

None is a requirement of this project.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# By the module that is imported: the joins it computes.
JOINS = {"attorch": ("none", "add"), "apex.contrib.groupbn.batch_norm": ("none", "add"), "timm.layers": ("none",)}


def why_not(module: str, join: str, precision: str, layout: str, device: torch.device) -> str | None:
    """None where the peer computes this, else the reason."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error})"
    if join not in JOINS[module]:
        return f"{module} has no such operation"
    if module != "timm.layers" and device.type != "cuda":
        return f"{module} runs on CUDA alone"
    if module == "attorch" and precision == "bf16":
        return "attorch refuses bf16"
    if module.startswith("apex") and (precision, layout) != ("fp16", "channels_last"):
        return "apex's groupbn takes fp16 in NHWC alone"
    return None


def attorch(n_channels: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    """The module, whose parameters and buffers are nn.BatchNorm2d's, and how it is called on (x, residual)."""
    module: Any = importlib.import_module("attorch").BatchNorm2d(n_channels, act_func="relu")
    return module, lambda x, residual: module(x, residual)


def apex(n_channels: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    """As `attorch`; its tensors are [N, H, W, C]."""
    groupbn: Any = importlib.import_module("apex.contrib.groupbn.batch_norm")
    module = groupbn.BatchNorm2d_NHWC(n_channels, fuse_relu=True)

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        z = None if residual is None else residual.permute(0, 2, 3, 1)
        return module(x.permute(0, 2, 3, 1), z).permute(0, 3, 1, 2)

    return module, call


def timm(n_channels: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    """As `attorch`, without a residual."""
    module: Any = importlib.import_module("timm.layers").BatchNormAct2d(n_channels)
    return module, lambda x, residual: module(x)


PEERS = {
    "attorch": ("attorch", attorch),
    "apex": ("apex.contrib.groupbn.batch_norm", apex),
    "timm": ("timm.layers", timm),
}
