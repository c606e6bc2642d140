"""Launch plans: the launches of a batch norm's passes, recorded once for a kind of arguments and then repeated.

A launch by Triton's `kernel[grid](...)` binds and looks up some twenty arguments, and choosing tiles and allocating
buffers takes as long. All of it depends on the kind of the arguments alone. So the first pass of a kind is recorded:
the compiled kernels, their grids and arguments. From these a Python function is written. It takes new tensors, makes
results and one workspace, and launches the same kernels with the new addresses.

Triton compiles for pointers that are multiples of 16, for numbers that are 1 or multiples of 16, and for types. Numbers
and types are in the caller's key; the function checks addresses. If somebody watches launches (a profiler's hooks,
TRITON_DEBUG), or a kernel or one of its globals has changed, it launches nothing and returns None: Triton has to.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .arguments import Gradients, Outputs, Saved
from .layout import layout

ALIGNMENT = 16  # of pointers, for which kernels are compiled
PADDING = 128  # of the buffers in a workspace: a line
# Compiled kernels of these versions are known to be launched as a written function launches them.
KNOWN_TRITON = ((3, 6), (3, 7))
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

_local = threading.local()  # launches: those of this thread while they are recorded


class Launched(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: Any  # None in the interpreter


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Note the launches of this thread inside the context."""
    _local.launches = launches = []
    try:
        yield launches
    finally:
        _local.launches = None


def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], compiled: Any) -> None:
    """Called at every launch."""
    launches = getattr(_local, "launches", None)
    if launches is not None:
        launches.append(Launched(kernel, grid, arguments, compiled))


def is_watched() -> bool:
    """Whether somebody wants to hear of launches, or has Triton check more at each."""
    runtime = knobs.runtime
    entered, left = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        runtime.debug
        or (entered is not None and getattr(entered, "calls", True))
        or (left is not None and getattr(left, "calls", True))
    )


def can_repeat(launches: Sequence[Launched]) -> bool:
    """Whether these launches depend on nothing but the addresses of their tensors."""
    tensors = [value for launched in launches for value in launched.arguments.values() if isinstance(value, Tensor)]
    return (
        VERSION in KNOWN_TRITON
        and all(launched.compiled is not None and len(launched.grid) == 1 for launched in launches)
        and not any("barrier_ptr" in launched.arguments for launched in launches)  # which is no buffer
        and all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)
        and not is_watched()
    )


class Writer:
    """Writes the function that repeats launches.

    Args:
        launches: as `recorded` noted them.
        inputs: the function's arguments, by name; None where there is no tensor.
        kept: buffers of the forward's workspace, their offsets by id.

    Every other tensor of a launch is a result, made like an input, or a buffer of the workspace.
    """

    def __init__(
        self, launches: Sequence[Launched], inputs: dict[str, Tensor | None], kept: dict[int, int] | None = None
    ) -> None:
        self.launches, self.inputs = launches, inputs
        self.offsets: dict[int, int] = {}  # of the workspace's buffers, by id
        self.workspace_bytes = 0
        self.values: dict[str, Any] = {}  # the function's globals
        self.addresses: dict[int, str] = {
            id(tensor): f"{name}_ptr" for name, tensor in inputs.items() if tensor is not None
        }
        for tensor, offset in (kept or {}).items():
            self.addresses[tensor] = f"workspace_ptr + {offset}"

    def write(self, results: Sequence[Tensor | None]) -> Callable[..., tuple] | None:
        """Return the function; it returns the results and its workspace. None if a result is like no input."""
        pointers = [f"{name}_ptr" for name, tensor in self.inputs.items() if tensor is not None]
        body = [f"{name}_ptr = {name}.data_ptr()" for name, tensor in self.inputs.items() if tensor is not None]
        returned = []
        for place, result in enumerate(results):
            returned.append("None" if result is None else f"result{place}")
            if result is None:
                continue
            like = self._like(result)
            if like is None:
                return None
            body += [f"result{place} = empty_like({like})", f"result{place}_ptr = result{place}.data_ptr()"]
            self.addresses[id(result)] = f"result{place}_ptr"
            pointers.append(f"result{place}_ptr")
        guards, calls = [], []
        for number, launched in enumerate(self.launches):
            guards += self._guards(number, launched)
            calls.append(self._call(number, launched))
        body += [
            f"buffers = empty({self.workspace_bytes}, dtype=uint8, device=device)",
            "buffers_ptr = buffers.data_ptr()",
        ]
        pointers.append("buffers_ptr")
        body += [f"if ({' | '.join(pointers)}) % {ALIGNMENT}: return None", "stream = get_stream(index)", *calls]
        body.append(f"return {', '.join((*returned, 'buffers'))}")
        guard = " or ".join(["get_device() != index", "is_watched()", *guards])
        lines = [f"def repeat({', '.join(self.inputs)}):", f"if {guard}: return None", *body]
        device = next(tensor for tensor in self.inputs.values() if tensor is not None).device
        self.values |= {"empty": torch.empty, "empty_like": torch.empty_like, "uint8": torch.uint8}
        self.values |= {"device": device, "index": device.index or 0, "is_watched": is_watched}
        active: Any = driver.active
        self.values |= {"get_device": active.get_current_device, "get_stream": active.get_current_stream}
        exec("\n    ".join(lines), self.values)
        return self.values["repeat"]

    def _like(self, result: Tensor) -> str | None:
        """An input of the same shape, strides and type."""
        for name, tensor in self.inputs.items():
            if tensor is not None and tensor.dtype == result.dtype and tensor.shape == result.shape:
                if tensor.stride() == result.stride():
                    return name
        return None

    def _guards(self, number: int, launched: Launched) -> Iterator[str]:
        kernel = launched.kernel
        self.values |= {f"kernel{number}": kernel, f"hash{number}": kernel.hash}
        yield f"kernel{number}.hash is not hash{number} or kernel{number}.pre_run_hooks"
        for name, (_, module) in ((name, used) for (name, _), used in kernel.used_global_vals.items()):
            self.values |= {f"module{number}": module, f"{name}{number}": module.get(name)}
            yield f"module{number}.get({name!r}) is not {name}{number}"

    def _call(self, number: int, launched: Launched) -> str:
        kernel, (n_programs,), arguments, compiled = launched
        texts = []
        for name in kernel.arg_names:
            value = arguments[name]
            if isinstance(value, Tensor):
                texts.append(self._address(value))
            elif value is None or type(value) in (int, bool):
                texts.append(repr(value))
            else:
                texts.append(f"{name}{number}")
                self.values[f"{name}{number}"] = value
        run = compiled.run
        self.values |= {f"run{number}": run, f"function{number}": compiled.function}
        self.values[f"metadata{number}"] = compiled.packed_metadata
        grid = f"{n_programs}, 1, 1, stream, function{number}"
        if type(run).__name__ != "CudaLauncher" or run.global_scratch_size or run.profile_scratch_size:
            return f"run{number}({grid}, metadata{number}, None, None, None, {', '.join(texts)})"
        # What CudaLauncher.__call__ does, in Python, for a kernel without scratch memory.
        self.values[f"run{number}"] = run.launch
        grid += f", {run.launch_cooperative_grid}, {run.launch_pdl}"
        if VERSION == (3, 6):
            return f"run{number}({grid}, None, None, metadata{number}, None, None, None, {', '.join(texts)})"
        self.values |= {f"annotations{number}": run.arg_annotations, f"signature{number}": run.kernel_signature}
        rest = f"None, None, None, None, None, annotations{number}, signature{number}"
        return f"run{number}({grid}, metadata{number}, {rest}, ({', '.join(texts)}))"

    def _address(self, tensor: Tensor) -> str:
        if id(tensor) not in self.addresses:
            self.offsets[id(tensor)] = self.workspace_bytes
            self.addresses[id(tensor)] = f"buffers_ptr + {self.workspace_bytes}"
            self.workspace_bytes += -(-tensor.nbytes // PADDING) * PADDING
        return self.addresses[id(tensor)]


class Kept(NamedTuple):
    """A buffer of the forward's workspace that the backward reads."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, workspace: Tensor) -> Tensor:
        n_bytes = self.shape.numel() * self.dtype.itemsize
        return workspace[self.offset : self.offset + n_bytes].view(self.dtype).view(self.shape)


FORWARD_INPUTS = (
    "x", "residual", "running_mean", "running_var", "weight", "bias",
    "residual_running_mean", "residual_running_var", "residual_weight", "residual_bias",
)  # fmt: skip


class Plan:
    """relu(bn(x) + residual) and its gradients for one kind of arguments, which the caller tells apart.

    `forward`, once it has been recorded, takes FORWARD_INPUTS and returns y and a workspace; or None.
    """

    def __init__(self) -> None:
        self.forward: Callable[..., tuple[Tensor, Tensor] | None] | None = None
        self._backward: dict[bool, Callable | None] = {}  # by whether there is a gradient of an alias
        self._kept: list[Kept | None] = []
        self._strides: tuple[int, ...] = ()
        self._layout = torch.contiguous_format

    def record_forward(self, run: Callable[[], Outputs], inputs: Sequence[Tensor | None]) -> Outputs:
        """Return what `run` returns, and record it if that can be."""
        with recorded() as launches:
            outputs = run()
        if can_repeat(launches):
            writer = Writer(launches, dict(zip(FORWARD_INPUTS, inputs, strict=True)))
            forward = writer.write([outputs.y])
            self._kept = [None if t is None else Kept(writer.offsets[id(t)], t.shape, t.dtype) for t in outputs[1:]]
            self._strides, self._layout = outputs.y.stride(), layout(outputs.y)
            self.forward = forward
        return outputs

    def saved(self, tensors: Sequence[Tensor | None]) -> Saved:
        """The tensors that a repeated forward has saved: x, its workspace, weight, bias; and in the bn join residual,
        residual_weight and residual_bias.
        """
        x, workspace, weight, bias, residual, residual_weight, residual_bias = tensors
        assert x is not None and workspace is not None
        relu_mask, mean, rstd, residual_mean, residual_rstd = (kept and kept.view(workspace) for kept in self._kept)
        of_residual = (residual, residual_mean, residual_rstd, residual_weight, residual_bias)
        return Saved(x, relu_mask, mean, rstd, weight, bias, *of_residual)  # type: ignore[arg-type]

    def backward(
        self,
        dy: Tensor,
        dy_alias: Tensor | None,
        tensors: Sequence[Tensor | None],
        run: Callable[[Tensor, Tensor | None, Saved], Gradients],
    ) -> Sequence[Tensor | None]:
        """The gradients, in the order of `Gradients`, and perhaps more; `run` computes them where Triton has to launch.

        `tensors`: as `saved` takes them.
        """
        x, workspace, weight, bias, residual, residual_weight, residual_bias = tensors
        assert x is not None and workspace is not None
        if dy.stride() != self._strides:
            dy = dy.contiguous(memory_format=self._layout)
        if dy_alias is not None and dy_alias.stride() != self._strides:
            dy_alias = dy_alias.contiguous(memory_format=self._layout)
        fork, gradients = dy_alias is not None, None
        # Hooks for saved tensors may have changed x and the residual.
        is_as_saved = x.stride() == self._strides and (residual is None or residual.stride() == self._strides)
        repeat = self._backward.get(fork) if is_as_saved else None
        if repeat is not None:
            gradients = repeat(dy, dy_alias, x, workspace, weight, bias, residual, residual_weight, residual_bias)
        if gradients is not None:
            return gradients
        saved = self.saved(tensors)
        with recorded() as launches:
            gradients = run(dy, dy_alias, saved)
        if is_as_saved and fork not in self._backward and can_repeat(launches):
            statistics = (saved.relu_mask, saved.mean, saved.rstd, saved.residual_mean, saved.residual_rstd)
            kept = {id(t): k.offset for t, k in zip(statistics, self._kept, strict=True) if k is not None}
            names = ("x", "workspace", "weight", "bias", "residual", "residual_weight", "residual_bias")
            inputs = {"dy": dy, "dy_alias": dy_alias, **dict(zip(names, tensors, strict=True))}
            self._backward[fork] = Writer(launches, inputs, kept).write(gradients)
        return gradients
