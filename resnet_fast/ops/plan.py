"""Launch plans: the launches of a batch norm's passes, recorded once for a kind of arguments and then repeated.

A launch by Triton's `kernel[grid](...)` binds and looks up some twenty arguments, and choosing tiles and allocating
buffers takes as long. None of it depends on anything but the kind of the arguments, so a plan keeps the compiled
kernels, the grids and all arguments that are no addresses, and repeats the launches with the addresses of new tensors.

Triton compiles for pointers that are multiples of 16, for numbers that are 1 or multiples of 16, and for types. Numbers
and types are in the caller's key; addresses are checked here. If somebody watches launches (a profiler's hooks,
TRITON_DEBUG), or a kernel or one of its globals has changed, nothing is repeated: Triton launches.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .arguments import Gradients, Outputs, Saved
from .layout import layout

ALIGNMENT = 16  # for which kernels are compiled
PADDING = 128  # between buffers in one allocation: a line
# The versions whose compiled kernels are known to be called as `Repeated.run` is.
KNOWN_TRITON = ((3, 6), (3, 7))

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


class Repeated(NamedTuple):
    """A launch without its addresses; `pick` takes its arguments, in order, out of all values of a recording."""

    kernel: Any
    hash: str
    globals: list[tuple[str, Any, dict[str, Any]]]
    run: Callable
    n_programs: int
    function: Any
    metadata: Any
    pick: itemgetter


class Recording:
    """Launches that are repeated with other tensors.

    Args:
        launches: as `recorded` noted them.
        inputs: the tensors that come from outside, in the order in which `repeat` takes their addresses.
        results: the tensors that each repetition makes anew and returns. All others are in one workspace.
    """

    def __init__(
        self, launches: list[Launched], inputs: Sequence[Tensor | None], results: Sequence[Tensor | None]
    ) -> None:
        first = next(tensor for tensor in inputs if tensor is not None)
        self.device, self.index, self.driver = first.device, first.device.index or 0, driver.active
        # Each is made like an input.
        self.results = [None if result is None else like(result, inputs) for result in results]
        order: dict[int, int] = {}  # the place of a tensor's address among the values
        for place, tensor in enumerate((*inputs, *results)):
            if tensor is not None:
                order.setdefault(id(tensor), place)
        n_places = len(inputs) + len(results)
        self.offsets: list[int] = []  # of the buffers in the workspace
        self.workspace_bytes = 0
        self.buffers: dict[int, int] = {}  # their offsets by id
        for launched in launches:
            for value in launched.arguments.values():
                if isinstance(value, Tensor) and id(value) not in order:
                    order[id(value)] = n_places + len(self.offsets)
                    self.buffers[id(value)] = self.workspace_bytes
                    self.offsets.append(self.workspace_bytes)
                    self.workspace_bytes += -(-value.nbytes // PADDING) * PADDING
        n_places += len(self.offsets)
        self.constants: list[Any] = []
        self.launches = []
        for kernel, grid, arguments, compiled in launches:
            places = []
            for name in kernel.arg_names:
                value = arguments[name]
                if isinstance(value, Tensor):
                    places.append(order[id(value)])
                else:
                    places.append(n_places + len(self.constants))
                    self.constants.append(value)
            of_globals = [
                (name, values.get(name), values) for (name, _), (_, values) in kernel.used_global_vals.items()
            ]
            (n_programs,) = grid
            called = (compiled.run, n_programs, compiled.function, compiled.packed_metadata)
            self.launches.append(Repeated(kernel, kernel.hash, of_globals, *called, itemgetter(*places)))

    def repeat(self, inputs: Sequence[Tensor | None], addresses: list[int]) -> list[Tensor | None] | None:
        """Launch all; None if Triton has to.

        Args:
            inputs: the tensors, as far as results are like them.
            addresses: of all inputs, 0 for None.

        Returns:
            The results, and behind them the workspace.
        """
        if self.driver.get_current_device() != self.index or is_watched():
            return None
        for kernel, recorded_hash, used_globals, *_ in self.launches:
            if kernel.hash is not recorded_hash or kernel.pre_run_hooks:
                return None
            for name, value, values in used_globals:
                if values.get(name) is not value:  # Triton raises
                    return None
        made: list[Tensor | None] = []
        values: list[Any] = addresses
        for like in self.results:
            if like is None:
                made.append(None)
                values.append(0)
            else:
                tensor = torch.empty_like(inputs[like])  # type: ignore[arg-type]
                made.append(tensor)
                values.append(tensor.data_ptr())
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self.device)
        start = workspace.data_ptr()
        made.append(workspace)
        values += [start + offset for offset in self.offsets]
        bits = 0
        for address in values:
            bits |= address
        if bits % ALIGNMENT:
            return None
        values += self.constants
        stream = self.driver.get_current_stream(self.index)
        for _, _, _, run, n_programs, function, metadata, pick in self.launches:
            run(n_programs, 1, 1, stream, function, metadata, None, None, None, *pick(values))
        return made


def like(result: Tensor, inputs: Sequence[Tensor | None]) -> int | None:
    """The place of an input of the same shape, strides and type."""
    for place, tensor in enumerate(inputs):
        if tensor is not None and tensor.dtype == result.dtype and tensor.shape == result.shape:
            if tensor.stride() == result.stride():
                return place
    return None


def record(
    launches: list[Launched], inputs: Sequence[Tensor | None], results: Sequence[Tensor | None]
) -> Recording | None:
    """The recording, unless these launches cannot be repeated."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    arguments = [value for launched in launches for value in launched.arguments.values()]
    addresses = [value.data_ptr() for value in (*inputs, *results, *arguments) if isinstance(value, Tensor)]
    if (
        version not in KNOWN_TRITON
        or any(launched.compiled is None for launched in launches)
        or any("barrier_ptr" in launched.arguments for launched in launches)  # which is no buffer
        or any(address % ALIGNMENT for address in addresses)
        or any(result is not None and like(result, inputs) is None for result in results)
        or is_watched()
    ):
        return None
    return Recording(launches, inputs, results)


class Kept(NamedTuple):
    """A buffer of the forward's workspace that the backward reads."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, workspace: Tensor) -> Tensor:
        n_bytes = self.shape.numel() * self.dtype.itemsize
        return workspace[self.offset : self.offset + n_bytes].view(self.dtype).view(self.shape)


class Plan:
    """relu(bn(x) + residual) and its gradients for one kind of arguments, which the caller tells apart.

    A pass is recorded when it first runs. What the forward saves is x, its workspace, weight, bias, and in the bn join
    the residual, its weight and its bias.
    """

    def __init__(self) -> None:
        self.forward: Recording | None = None
        self.backward: dict[bool, Recording | None] = {}  # by whether there is a gradient of an alias
        self.kept: list[Kept | None] = []
        self.strides: tuple[int, ...] = ()
        self.layout = torch.contiguous_format

    def record_forward(self, run: Callable[[], Outputs], inputs: Sequence[Tensor | None]) -> Outputs:
        """Run, and record. `inputs` in the order of `repeat_forward`."""
        with recorded() as launches:
            outputs = run()
        recording = record(launches, inputs, outputs[:1])
        if recording is not None:
            self.kept = [None if t is None else Kept(recording.buffers[id(t)], t.shape, t.dtype) for t in outputs[1:]]
            self.strides, self.layout = outputs.y.stride(), layout(outputs.y)
            self.forward = recording
        return outputs

    def repeat_forward(self, inputs: Sequence[Tensor | None]) -> list[Any] | None:
        """y and the workspace, or None if Triton has to launch.

        `inputs`: x, residual, and of each of the two norms running_mean, running_var, weight, bias.
        """
        return self.forward.repeat(inputs, [0 if t is None else t.data_ptr() for t in inputs]) if self.forward else None

    def saved(self, tensors: Sequence[Tensor | None]) -> Saved:
        """What the forward saved, as all others take it."""
        x, workspace, weight, bias, residual, residual_weight, residual_bias = tensors
        assert x is not None and workspace is not None
        relu_mask, mean, rstd, residual_mean, residual_rstd = (kept and kept.view(workspace) for kept in self.kept)
        of_residual = (residual, residual_mean, residual_rstd, residual_weight, residual_bias)
        return Saved(x, relu_mask, mean, rstd, weight, bias, *of_residual)  # type: ignore[arg-type]

    def repeat_backward(
        self,
        dy: Tensor,
        dy_alias: Tensor | None,
        tensors: Sequence[Tensor | None],
        run: Callable[[Tensor, Tensor | None, Saved], Gradients],
    ) -> Sequence[Tensor | None]:
        """The gradients, in the order of `Gradients`, and perhaps more; `run` computes them where Triton has to launch.

        `tensors`: what the forward saved.
        """
        x, workspace, weight, bias, residual, residual_weight, residual_bias = tensors
        assert x is not None and workspace is not None
        strides = self.strides
        if dy.stride() != strides:
            dy = dy.contiguous(memory_format=self.layout)
        if dy_alias is not None and dy_alias.stride() != strides:
            dy_alias = dy_alias.contiguous(memory_format=self.layout)
        # Hooks for saved tensors may have changed these.
        if x.stride() != strides or (residual is not None and residual.stride() != strides):
            return run(dy, dy_alias, self.saved(tensors))
        fork = dy_alias is not None
        if fork not in self.backward:
            saved = self.saved(tensors)
            with recorded() as launches:
                gradients = run(dy, dy_alias, saved)
            self.backward[fork] = record(launches, (dy, dy_alias, *saved), gradients)
            return gradients
        recording = self.backward[fork]
        found = None
        if recording is not None:
            start = workspace.data_ptr()
            kept = [0 if one is None else start + one.offset for one in self.kept]
            inputs = (
                dy, dy_alias, x, None, None, None, weight, bias, residual, None, None, residual_weight, residual_bias,
            )  # fmt: skip
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in inputs]
            addresses[3:6], addresses[9:11] = kept[:3], kept[3:]
            found = recording.repeat(inputs, addresses)
        return run(dy, dy_alias, self.saved(tensors)) if found is None else found
