"""The one choice between the Triton kernels and ATen, and the one guarded import of triton.

The modules that import triton, which launch kernels, are taken from here: without triton they are None.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["triton", "aten"]
# A tensor without the wrapper that a transform of torch.func which has ended may have left around it.
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
    """None where the Triton kernels run for tensors on `device`, else the reason why they do not."""
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
    """Whether Triton's kernels run in its interpreter, which is for tests, and slow."""
    return _INTERPRETED


def choose_backend(x: Tensor, requested: Backend | None = None) -> Backend:
    """The backend for x: the requested one, or Triton wherever it runs and there is something to compute, else ATen.

    torch.export gets ATen, whose operators have gradients and run where this library is not installed, and so do the
    transforms of torch.func, which need operators that transform.

    Raises:
        ValueError: `requested` is no backend.
        RuntimeError: `requested` is "triton" and cannot run x; a named choice never falls back in silence.
    """
    if requested is not None and requested not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)} or None, got {requested!r}")
    if requested == "aten":
        return "aten"
    # What torch.compiler.is_exporting() returns, which torch 2.11's compiler takes for true in torch.compile, too.
    if torch.compiler._is_exporting_flag:
        reason = "torch.export keeps ATen operators alone"
    elif torch._C._are_functorch_transforms_active():  # as torch.autograd.Function asks
        reason = "torch.func transforms ATen operators alone"
    else:
        reason = why_not_triton(x.device) if x.numel() > 0 else "x has no elements"
    if requested == "triton" and reason is not None:
        raise RuntimeError(f"backend 'triton' was asked for, but {reason}")
    return "triton" if reason is None else "aten"


def is_plain(x: object) -> bool:
    """Whether x is a tensor of which nothing traces, transforms or watches operators, as far as one can know."""
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
    """Makes x's device the current one, where kernels are launched."""
    return nullcontext() if x.device.type == "cpu" else torch.get_device_module(x.device).device(x.device)


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Have cuDNN time its algorithms for each new shape, or not; never if they must be deterministic."""
    is_deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    library: Any = torch._C  # torch.backends.cudnn refuses its own flags once torch's test suite has been imported
    before = library._get_cudnn_benchmark()
    library._set_cudnn_benchmark(enabled and not is_deterministic)
    try:
        yield
    finally:
        library._set_cudnn_benchmark(before)
