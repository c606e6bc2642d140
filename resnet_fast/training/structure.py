"""Whether saved tensors are built as those that they go into: names, shapes and types, before any is copied."""

from typing import Any

import torch
from torch import Tensor

from resnet_fast.checks import shown


def difference(own: Any, saved: Any, name: str) -> str:
    """Return the first place where `saved` is not built as `own`, in words; "" where there is none.

    Args:
        own: tensors, and other values of which only the type counts, in dicts.
        saved: what must have its names, shapes and types.
        name: of it.
    """
    if isinstance(own, Tensor):
        if not isinstance(saved, Tensor) or _kind(saved) != _kind(own) or _is_meta(saved):
            return f"{name} must be {_describe(own)}, got {'no values' if _is_meta(saved) else _describe(saved)}"
    elif isinstance(own, dict):
        if not isinstance(saved, dict):
            return f"{name} must be a dict, got {shown(saved)}"
        if missing := [key for key in own if key not in saved]:
            return f"{name} holds no {missing[0]}"
        if more := [key for key in saved if key not in own]:
            return f"{name} holds {shown(more[0])}, which does not belong there"
        return next(filter(None, (difference(own[key], saved[key], f"{name}.{key}") for key in own)), "")
    elif type(own) is not type(saved):
        return f"{name} must be {shown(own)}, got {shown(saved)}"
    return ""


@torch.no_grad()
def copy_into(own: Any, saved: Any) -> None:
    """Copy the tensors of `saved` into those of `own`, which are built alike."""
    if isinstance(own, Tensor):
        own.copy_(saved)
    elif isinstance(own, dict):
        for key in own:
            copy_into(own[key], saved[key])


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.layout


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return shown(value)
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta
