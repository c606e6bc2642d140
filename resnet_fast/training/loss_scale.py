"""The loss scale of fp16: torch.amp.GradScaler, used in a way that a CUDA graph can record.

    scaler.scale(loss).backward()
    scaler.step(optimizer)              # fused: the kernel divides by the scale and skips bad steps itself
    overflow = has_overflowed(scaler, optimizer)
    scaler.update()                     # doubles the scale after 2,000 good steps in a row, halves it after a bad one

The scale, the number of good steps and the overflow are tensors on the device, and nothing here waits for them. Without
fp16 the scaler is disabled: `scale` returns the loss unchanged, and `step` is `optimizer.step()`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler


def make_scaler(precision: str, device: torch.device) -> GradScaler:
    """Return the scaler for a precision, enabled in fp16 only, with its scale on the device."""
    scaler = GradScaler(device.type, enabled=precision == "fp16")
    scaler.scale(torch.zeros((), device=device))  # creates the tensors, which must exist before a graph is recorded
    return scaler


def has_overflowed(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> Tensor:
    """Return whether the last step was skipped: [], fp32, 1 or 0. Call this before `scaler.update()`."""
    (overflow,) = scaler._found_inf_per_device(optimizer).values()
    return overflow


def load_scale(own: GradScaler, saved: dict[str, Any]) -> None:
    """Load the scale and the position in the growth interval, not the settings, of a saved `GradScaler.state_dict()`.

    Do nothing if `own` is disabled.

    Raises:
        ValueError: the scale is outside of fp32's range, or the position is outside of `own`'s growth interval.
    """
    if not own.is_enabled():
        return
    scale, position, interval = saved["scale"], saved["_growth_tracker"], own.get_growth_interval()
    fp32 = torch.finfo(torch.float32)
    if not fp32.tiny <= scale <= fp32.max:
        allowed = f"in {fp32.tiny:.1e} … {fp32.max:.1e}, the range of fp32"
        raise ValueError(f"step.scaler.scale must be {allowed}, got {scale}")
    if not 0 <= position < interval:
        raise ValueError(f"step.scaler._growth_tracker must be an integer, 0 … {interval - 1:,}, got {position}")
    own.load_state_dict({**own.state_dict(), "scale": scale, "_growth_tracker": position})
