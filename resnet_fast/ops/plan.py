"""Launch plans: the launches of a batch norm's passes, recorded once for each kind of arguments and then replayed.

A launch by Triton's `kernel[grid](...)` binds and looks up some twenty arguments, and choosing tiles and allocating
buffers takes as long again. All of this depends only on the kind of the arguments. So the first pass of a kind is
recorded: the compiled kernels, their grids and arguments. From the record a Python function is written. It accepts
new tensors, allocates results and one workspace, and launches the same kernels with the new addresses.

Triton specializes kernels for pointers that are multiples of 16, for integers that are 1 or multiples of 16, and for
types. Integers and types are in the caller's key; the function checks addresses. If launches are watched (a profiler's
hooks, TRITON_DEBUG), or a kernel or one of its globals has changed, the function leaves the launches to Triton.
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

from .arguments import Gradients, Inputs, Outputs, Saved, Settings
from .layout import layout

ALIGNMENT = 16  # kernels are compiled for pointers with this alignment
PADDING = 128  # buffers in a workspace start at cache lines
# In these versions compiled kernels are launched as a written function launches them.
KNOWN_TRITON = ((3, 6), (3, 7))
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Tensors that a pass allocates for itself, or that the forward saves for the backward.
BUFFERS = {
    "partials_ptr", "sums_ptr", "dz_ptr", "mean_ptr", "rstd_ptr", "relu_mask_ptr",
    "residual_partials_ptr", "residual_mean_ptr", "residual_rstd_ptr",
}  # fmt: skip
BACKWARD_INPUTS = ("dy", "dy_alias", *Inputs._fields[:6], "workspace")

_local = threading.local()  # launches: the list of this thread's launches while they are recorded


class Launched(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: Any  # None in the interpreter


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Record the launches of this thread inside the context."""
    _local.launches = launches = []
    try:
        yield launches
    finally:
        _local.launches = None


def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], compiled: Any) -> None:
    """Record a launch, if this thread records launches."""
    launches = getattr(_local, "launches", None)
    if launches is not None:
        launches.append(Launched(kernel, grid, arguments, compiled))


def is_watched() -> bool:
    """Return whether a profiler or a debugger observes launches."""
    runtime = knobs.runtime
    entered, left = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        runtime.debug
        or (entered is not None and getattr(entered, "calls", True))
        or (left is not None and getattr(left, "calls", True))
    )


def distinct(values: Sequence[Any]) -> list[Any]:
    """Return the values as distinct objects, so that a launch's arguments can be recognized by identity."""
    found, seen = [], set()
    for value in values:
        if isinstance(value, Tensor):
            value = value.detach() if id(value) in seen else value
        elif value is not None:
            value = float.fromhex(float(value).hex())
        seen.add(id(value))
        found.append(value)
    return found


def can_replay(launches: Sequence[Launched], device: torch.device) -> bool:
    """Return whether these launches depend only on their inputs, and can be replayed."""
    tensors = [value for launched in launches for value in launched.arguments.values() if isinstance(value, Tensor)]
    active: Any = driver.active if launches and launches[0].compiled is not None else None
    return (
        active is not None
        and VERSION in KNOWN_TRITON
        and all(launched.compiled is not None and len(launched.grid) == 1 for launched in launches)
        and all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)
        and active.get_current_device() == (device.index or 0)
        and not is_watched()
    )


class Writer:
    """The writer of the function that replays launches.

    Args:
        launches: the list from `recorded`.
        inputs: the function's arguments, by name: tensors, numbers, or None if absent.
        kept: offsets of buffers in the forward's workspace, by id.

    Every other tensor of a launch is a result, allocated like an input, or a buffer of the workspace.
    """

    def __init__(
        self, launches: Sequence[Launched], inputs: dict[str, Any], kept: dict[int, int] | None = None
    ) -> None:
        self.launches, self.inputs = launches, inputs
        self.tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        self.offsets: dict[int, int] = {}  # of the workspace's buffers, by id
        self.workspace_bytes = 0
        self.values: dict[str, Any] = {}  # the function's globals
        self.texts = {id(value): name for name, value in inputs.items() if isinstance(value, float)}
        self.texts |= {id(tensor): f"{name}_ptr" for name, tensor in self.tensors.items()}
        self.texts |= {buffer: f"workspace_ptr + {offset}" for buffer, offset in (kept or {}).items()}

    def write(
        self, results: Sequence[Tensor | None], returned: str, otherwise: Callable[..., tuple]
    ) -> Callable[..., tuple] | None:
        """Write the function.

        `returned` is an expression of result0, result1, … and the workspace, `buffers`. `otherwise` is called with the
        same arguments if the launches cannot be replayed.

        Return None if no input has a result's shape, strides and type, or a tensor of a launch is not in `BUFFERS`.
        """
        body = [f"{name}_ptr = {name}.data_ptr()" for name in self.tensors]
        pointers = [f"{name}_ptr" for name in self.tensors]
        for place, result in enumerate(results):
            if result is None:
                continue
            like = self._like(result)
            if like is None:
                return None
            body += [f"result{place} = empty_like({like})", f"result{place}_ptr = result{place}.data_ptr()"]
            self.texts[id(result)] = f"result{place}_ptr"
            pointers.append(f"result{place}_ptr")
        guards, calls = [], []
        for number, launched in enumerate(self.launches):
            call = self._call(number, launched)
            if call is None:
                return None
            guards += self._guards(number, launched.kernel)
            calls.append(call)
        body += [f"buffers = empty({self.workspace_bytes}, dtype=uint8, device=device)"]
        body += ["buffers_ptr = buffers.data_ptr()"]
        by_triton = f"return otherwise({', '.join(self.inputs)})"
        body += [f"if ({' | '.join((*pointers, 'buffers_ptr'))}) % {ALIGNMENT}: {by_triton}"]
        body += ["stream = get_stream(index)", *calls, f"return {returned}"]
        guard = " or ".join(["get_device() != index", "is_watched()", *guards])
        lines = [f"def replay({', '.join(self.inputs)}):", f"if {guard}: {by_triton}", *body]
        active: Any = driver.active
        device = next(iter(self.tensors.values())).device
        self.values |= {
            "otherwise": otherwise,
            "empty": torch.empty,
            "empty_like": torch.empty_like,
            "uint8": torch.uint8,
        }
        self.values |= {"device": device, "index": device.index or 0, "is_watched": is_watched}
        self.values |= {"get_device": active.get_current_device, "get_stream": active.get_current_stream}
        exec("\n    ".join(lines), self.values)
        return self.values["replay"]

    def _like(self, result: Tensor) -> str | None:
        """Return the name of an input with the result's shape, strides and type."""
        kind = result.dtype, result.shape, result.stride()
        kinds = {name: (tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in self.tensors.items()}
        return next((name for name in kinds if kinds[name] == kind), None)

    def _guards(self, number: int, kernel: Any) -> Iterator[str]:
        self.values |= {f"kernel{number}": kernel, f"hash{number}": kernel.hash}
        yield f"kernel{number}.hash is not hash{number} or kernel{number}.pre_run_hooks"
        for place, ((name, _), (_, module)) in enumerate(kernel.used_global_vals.items()):
            own = f"{number}_{place}"
            self.values |= {f"module{own}": module, f"global{own}": module.get(name)}
            yield f"module{own}.get({name!r}) is not global{own}"

    def _call(self, number: int, launched: Launched) -> str | None:
        kernel, (n_programs,), arguments, compiled = launched
        texts = []
        for name in kernel.arg_names:
            value = arguments[name]
            if isinstance(value, Tensor) and id(value) not in self.texts:
                if name not in BUFFERS:
                    return None
                self.offsets[id(value)] = self.workspace_bytes
                self.texts[id(value)] = f"buffers_ptr + {self.workspace_bytes}"
                self.workspace_bytes += -(-value.nbytes // PADDING) * PADDING
            if id(value) in self.texts:
                texts.append(self.texts[id(value)])
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
        # For a kernel without scratch memory, call what CudaLauncher.__call__ calls, without its Python code.
        self.values[f"run{number}"] = run.launch
        grid += f", {run.launch_cooperative_grid}, {run.launch_pdl}"
        if VERSION == (3, 6):
            return f"run{number}({grid}, None, None, metadata{number}, None, None, None, {', '.join(texts)})"
        self.values |= {f"annotations{number}": run.arg_annotations, f"signature{number}": run.kernel_signature}
        rest = f"None, None, None, None, None, annotations{number}, signature{number}"
        return f"run{number}({grid}, metadata{number}, {rest}, ({', '.join(texts)}))"


class Kept(NamedTuple):
    """A buffer of the forward's workspace that the backward reads."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, workspace: Tensor) -> Tensor:
        n_bytes = self.shape.numel() * self.dtype.itemsize
        return workspace[self.offset : self.offset + n_bytes].view(self.dtype).view(self.shape)


class Plan:
    """relu(bn(x) + residual) and its gradients for one kind of arguments, which the caller distinguishes.

    Args:
        settings: the settings of the passes.
        forward, backward: functions that compute the passes by Triton, such as those of ops/batch_norm.py.

    The method `forward` accepts the fields of `Inputs`. It returns y and a tuple of the other tensors that the backward
    needs besides the inputs: one workspace, or five tensors until a forward has been recorded.
    """

    def __init__(
        self,
        settings: Settings,
        forward: Callable[[Inputs, Settings], Outputs],
        backward: Callable[[Tensor, Tensor | None, Saved, Settings], Gradients],
    ) -> None:
        self._settings, self._forward, self._backward = settings, forward, backward
        self.forward: Callable[..., tuple[Tensor, tuple]] = self._run_forward
        self._replay_backward: dict[bool, Callable | None] = {}  # by whether dy_alias is given
        self._kept: list[Kept | None] = []  # ReLU mask, mean, rstd, the residual's mean and rstd; empty: not recorded
        self._workspace_bytes = 0
        self._strides: tuple[int, ...] = ()
        self._layout = torch.contiguous_format

    def _run_forward(self, *inputs: Any) -> tuple[Tensor, tuple]:
        """Run the forward by Triton, and record it if it has not been recorded."""
        given = Inputs._make(distinct(inputs))
        with recorded() as launches:
            outputs = self._forward(given, self._settings)
        if not self._kept and can_replay(launches, outputs.y.device):
            writer = Writer(launches, given._asdict())
            forward = writer.write([outputs.y], "result0, (buffers,)", self._run_forward)
            if forward is not None:
                self._workspace_bytes = writer.workspace_bytes
                self._kept = [t if t is None else Kept(writer.offsets[id(t)], t.shape, t.dtype) for t in outputs[1:]]
                self._strides, self._layout = outputs.y.stride(), layout(outputs.y)
                self.forward = forward
        if not self._kept:
            return outputs.y, outputs[1:]
        # As a replay returns them: activation checkpointing needs the same saved tensors from every forward.
        workspace = torch.empty(self._workspace_bytes, dtype=torch.uint8, device=outputs.y.device)
        for kept, tensor in zip(self._kept, outputs[1:], strict=True):
            if kept is not None and tensor is not None:
                kept.view(workspace).copy_(tensor)
        return outputs.y, (workspace,)

    def saved(self, tensors: Sequence[Any]) -> Saved:
        """Return a forward's saved tensors, from the first six `Inputs` and the tuple that `forward` returned."""
        if len(tensors) == len(Saved._fields):
            return Saved._make(tensors)
        *inputs, workspace = tensors
        return Saved(*inputs, *(one and one.view(workspace) for one in self._kept))  # type: ignore[arg-type]

    def backward(self, dy: Tensor, dy_alias: Tensor | None, tensors: Sequence[Any]) -> Sequence[Tensor | None]:
        """Return the gradients in the order of `Gradients`; `tensors` are the arguments of `saved`."""
        if len(tensors) == len(Saved._fields):
            return self._backward(dy, dy_alias, self.saved(tensors), self._settings)
        strides = self._strides
        if dy.stride() != strides:
            dy = dy.contiguous(memory_format=self._layout)
        if dy_alias is not None and dy_alias.stride() != strides:
            dy_alias = dy_alias.contiguous(memory_format=self._layout)
        replay = self._replay_backward.get(dy_alias is not None)
        x, residual, *_ = tensors
        if replay is None or not self._is_image(x, dy) or (residual is not None and not self._is_image(residual, dy)):
            return self._run_backward(dy, dy_alias, *tensors)
        return replay(dy, dy_alias, *tensors)

    def _is_image(self, tensor: Any, dy: Tensor) -> bool:
        """Return whether a saved tensor has the forward's strides and type: hooks may have replaced it."""
        return tensor.stride() == self._strides and tensor.dtype == dy.dtype

    def _run_backward(self, *inputs: Any) -> Gradients:
        """Run the backward by Triton, and record it if it has not been recorded."""
        dy, dy_alias, *tensors = given = distinct(inputs)
        saved, fork = self.saved(tensors), dy_alias is not None
        with recorded() as launches:
            gradients = self._backward(dy, dy_alias, saved, self._settings)
        images = [tensor for tensor in (saved.x, saved.residual) if tensor is not None]
        are_as_saved = all(self._is_image(image, dy) for image in images)
        if fork not in self._replay_backward and are_as_saved and can_replay(launches, dy.device):
            kept = {id(t): one.offset for t, one in zip(saved[6:], self._kept, strict=True) if one is not None}
            writer = Writer(launches, dict(zip(BACKWARD_INPUTS, given, strict=True)), kept)
            results = ", ".join("None" if one is None else f"result{place}" for place, one in enumerate(gradients))
            self._replay_backward[fork] = writer.write(gradients, results, self._run_backward)
        return gradients
