"""Compare names, shapes and types of saved tensors with those of their targets, before any is copied."""

from typing import Any

import torch
from torch import Tensor

from resnet_fast.common.checks import shown


def first_difference(own: Any, saved: Any, name: str) -> str:
    """Return a message about the first difference in structure between `saved` and `own`; "" if there is none.

    Args:
        own: tensors and other values in dicts; of other values, only the type counts.
        saved: the values that must have the names, shapes and types of `own`.
        name: their name in the message.
    """
    if isinstance(own, Tensor):
        if not isinstance(saved, Tensor):
            return f"{name} must be {_describe(own)}, got {shown(saved)}"
        if saved.is_meta or _describe(saved) != _describe(own):
            return f"{name} must be {_describe(own)}, got {'no values' if saved.is_meta else _describe(saved)}"
    elif isinstance(own, dict):
        if not isinstance(saved, dict):
            return f"{name} must be a dict, got {shown(saved)}"
        if missing := [key for key in own if key not in saved]:
            return f"{name} holds no {missing[0]}"
        if more := [key for key in saved if key not in own]:
            return f"{name} holds {shown(more[0])}, which does not belong there"
        return next(filter(None, (first_difference(own[key], saved[key], f"{name}.{key}") for key in own)), "")
    elif type(own) is not type(saved):
        return f"{name} must be {shown(own)}, got {shown(saved)}"
    return ""


@torch.no_grad()
def copy_into(own: Any, saved: Any) -> None:
    """Copy the tensors of `saved` into those of `own`, which has the same structure."""
    if isinstance(own, Tensor):
        own.copy_(saved)
    elif isinstance(own, dict):
        for key in own:
            copy_into(own[key], saved[key])


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    return f"{tensor.dtype} {list(tensor.shape)}{layout}".replace("torch.", "")
