"""The only choice between the Triton kernels and ATen, and the only guarded import of triton.

Import the modules that launch kernels from here: without triton they are None.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["triton", "aten"]
# Removes the wrapper that a finished torch.func transform may have left around a tensor.
unwrap_if_dead = torch._C._functorch.unwrap_if_dead  # type: ignore[attr-defined]
INTERPRETER = "TRITON_INTERPRET"  # the environment variable that Triton reads when kernels are imported

augment_launch: Any
conv3x3: Any
launch: Any
plan: Any
single_read: Any
try:
    import triton
except ImportError as error:  # a machine without triton works, on ATen
    augment_launch = conv3x3 = launch = plan = single_read = None
    _TRITON_MISSING: str | None = f"triton cannot be imported ({error})"
    _INTERPRETED = False
else:
    from . import augment_launch, conv3x3, launch, plan, single_read  # noqa: F401

    _TRITON_MISSING = None
    _INTERPRETED = bool(triton.knobs.runtime.interpret)  # type: ignore[attr-defined]


def why_not_triton(device: torch.device) -> str | None:
    """Return None if the Triton kernels run for tensors on `device`, else the reason why they do not."""
    if _TRITON_MISSING is not None:
        return _TRITON_MISSING
    if device.type in ("cuda", "xpu"):  # ROCm calls its devices cuda, too
        return None
    if device.type == "cpu":
        if _INTERPRETED:
            return None
        return f"CPU tensors need Triton's interpreter: set {INTERPRETER}=1 before resnet_fast is imported"
    return f"Triton has no backend for {device.type} tensors"


def is_interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, which is slow and meant for tests."""
    return _INTERPRETED


def choose_backend(x: Tensor, requested: Backend | None = None) -> Backend:
    """Return the backend for x: the requested one, or else Triton if it runs here and x has elements, else ATen.

    torch.export uses ATen, whose operators have gradients and run where this library is not installed. The transforms
    of torch.func also use it, because they need operators with transform rules.

    Raises:
        ValueError: `requested` is neither a backend nor None.
        RuntimeError: `requested` is "triton", which cannot run x; an explicit choice never falls back silently.
    """
    if requested is not None and requested not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)} or None, got {requested!r}")
    if requested == "aten":
        return "aten"
    # The value of torch.compiler.is_exporting(), which torch 2.11's compiler assumes to be true in torch.compile, too.
    if torch.compiler._is_exporting_flag:
        reason = "torch.export needs ATen operators"
    elif torch._C._are_functorch_transforms_active():  # the check of torch.autograd.Function
        reason = "torch.func needs ATen operators"
    else:
        reason = why_not_triton(x.device) if x.numel() > 0 else "x has no elements"
    if requested == "triton" and reason is not None:
        raise RuntimeError(f"backend 'triton' was asked for, but {reason}")
    return "triton" if reason is None else "aten"


def is_plain(x: object) -> bool:
    """Return whether x is a plain tensor and nothing that can be detected traces, transforms or watches operators."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.compiler._is_exporting_flag
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
        and unwrap_if_dead(x) is x
    )


def device_guard(x: Tensor):
    """Return a context in which x's device is the current one, on which kernels are launched."""
    return nullcontext() if x.device.type == "cpu" else torch.get_device_module(x.device).device(x.device)


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Turn cuDNN's timing of algorithms for each new shape on or off; it stays off if they must be deterministic."""
    is_deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    library: Any = torch._C  # torch.backends.cudnn rejects changes once torch's test suite has been imported
    before = library._get_cudnn_benchmark()
    library._set_cudnn_benchmark(enabled and not is_deterministic)
    try:
        yield
    finally:
        library._set_cudnn_benchmark(before)
