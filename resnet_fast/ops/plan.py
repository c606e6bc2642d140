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
    """Whether somebody wants to hear of launches, or of what Triton checks at each."""
    runtime = knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return bool(runtime.debug) or any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


class Repeated(NamedTuple):
    """A launch without its addresses; `pick` takes its arguments, in order, out of all values of a recording."""

    kernel: Any
    hash: str
    globals: list[tuple[str, Any, dict[str, Any]]]
    run: Callable
    grid: tuple[int, ...]
    function: Any
    metadata: Any
    pick: itemgetter

    def is_current(self) -> bool:
        """Whether the kernel is what was recorded. Where a global has changed, Triton raises."""
        kernel = self.kernel
        if kernel.hash is not self.hash or kernel.pre_run_hooks:
            return False
        return all(values.get(name) == value for name, value, values in self.globals)


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
        self.device, self.index = first.device, first.device.index or 0
        self.results = [None if result is None else _Like.of(result, inputs) for result in results]
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
            of_globals = [(name, value, values) for (name, _), (value, values) in kernel.used_global_vals.items()]
            called = (compiled.run, (*grid, 1, 1)[:3], compiled.function, compiled.packed_metadata)
            self.launches.append(Repeated(kernel, kernel.hash, of_globals, *called, itemgetter(*places)))

    def repeat(self, inputs: Sequence[Tensor | None], addresses: list[int]) -> list[Tensor | None] | None:
        """Launch all; None if Triton has to.

        Args:
            inputs: the tensors, as far as results are like them.
            addresses: of all inputs, 0 for None.

        Returns:
            The results, and behind them the workspace.
        """
        active = driver.active
        if active.get_current_device() != self.index or is_watched():
            return None
        values: list[Any] = addresses
        made: list[Tensor | None] = []
        for like in self.results:
            tensor = None if like is None else like.make(inputs)
            made.append(tensor)
            values.append(0 if tensor is None else tensor.data_ptr())
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self.device)
        start = workspace.data_ptr()
        values += [start + offset for offset in self.offsets]
        bits = 0
        for address in values:
            bits |= address
        if bits % ALIGNMENT:
            return None
        values += self.constants
        launches = self.launches
        for launch in launches:
            if not launch.is_current():
                return None
        stream = active.get_current_stream(self.index)
        for _, _, _, run, (x, y, z), function, metadata, pick in launches:
            run(x, y, z, stream, function, metadata, None, None, None, *pick(values))
        made.append(workspace)
        return made


class _Like(NamedTuple):
    """How a result is made: like an input, or by its shape."""

    place: int | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, result: Tensor, inputs: Sequence[Tensor | None]) -> "_Like":
        def is_like(tensor: Tensor | None) -> bool:
            kinds = [(t.shape, t.stride(), t.dtype) for t in (tensor, result) if t is not None]
            return len(kinds) == 2 and kinds[0] == kinds[1]

        place = next((place for place, tensor in enumerate(inputs) if is_like(tensor)), None)
        assert place is not None or result.is_contiguous()
        return cls(place, result.shape, result.dtype, result.device)

    def make(self, inputs: Sequence[Tensor | None]) -> Tensor:
        if self.place is None:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return torch.empty_like(inputs[self.place])  # type: ignore[arg-type]


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

    A pass is recorded when it first runs. What the forward saves is x, the ReLU mask, the workspace, weight, bias, and
    in the bn join the residual, its weight and its bias.
    """

    def __init__(self) -> None:
        self.forward: Recording | None = None
        self.backward: dict[bool, Recording | None] = {}  # by whether there is a gradient of an alias
        self.kept: list[Kept | None] = []
        self.strides: tuple[int, ...] = ()

    def record_forward(self, run: Callable[[], Outputs], inputs: Sequence[Tensor | None]) -> Outputs:
        """Run, and record. `inputs` in the order of `repeat_forward`."""
        with recorded() as launches:
            outputs = run()
        recording = record(launches, inputs, outputs[:2])
        if recording is not None:
            self.kept = [None if t is None else Kept(recording.buffers[id(t)], t.shape, t.dtype) for t in outputs[2:]]
            self.strides = outputs.y.stride()
            self.forward = recording
        return outputs

    def repeat_forward(self, inputs: Sequence[Tensor | None]) -> list[Any] | None:
        """y, the ReLU mask and the workspace, or None if the launches go by Triton.

        `inputs`: x, residual, and of each of the two norms running_mean, running_var, weight, bias.
        """
        return self.forward.repeat(inputs, [0 if t is None else t.data_ptr() for t in inputs]) if self.forward else None

    def saved(self, tensors: Sequence[Tensor | None]) -> Saved:
        """What the forward saved, as all others take it."""
        x, relu_mask, workspace, weight, bias, residual, residual_weight, residual_bias = tensors
        assert x is not None and workspace is not None
        mean, rstd, residual_mean, residual_rstd = (kept and kept.view(workspace) for kept in self.kept)
        of_residual = (residual, residual_mean, residual_rstd, residual_weight, residual_bias)
        return Saved(x, relu_mask, mean, rstd, weight, bias, *of_residual)  # type: ignore[arg-type]

    def repeat_backward(
        self,
        dy: Tensor,
        dy_alias: Tensor | None,
        tensors: Sequence[Tensor | None],
        run: Callable[[Saved], Gradients],
    ) -> Sequence[Tensor | None]:
        """The gradients, in the order of `Gradients`, and perhaps more; `run` computes them where Triton has to launch.

        `tensors`: what the forward saved.
        """
        x, relu_mask, workspace, weight, bias, residual, residual_weight, residual_bias = tensors
        assert x is not None and workspace is not None
        likes = (dy, dy_alias, x, residual)
        if any(tensor is not None and tensor.stride() != self.strides for tensor in likes):
            return run(self.saved(tensors))
        fork = dy_alias is not None
        if fork not in self.backward:
            saved = self.saved(tensors)
            with recorded() as launches:
                gradients = run(saved)
            self.backward[fork] = record(launches, (dy, dy_alias, *saved), gradients)
            return gradients
        recording = self.backward[fork]
        found = None
        if recording is not None:
            start = workspace.data_ptr()
            mean, rstd, residual_mean, residual_rstd = (
                0 if kept is None else start + kept.offset for kept in self.kept
            )
            inputs = (
                dy, dy_alias, x, relu_mask, None, None, weight, bias, residual, None, None, residual_weight,
                residual_bias,
            )  # fmt: skip
            addresses: list[int] = [0 if tensor is None else tensor.data_ptr() for tensor in inputs]
            addresses[4:6] = mean, rstd
            addresses[9:11] = residual_mean, residual_rstd
            found = recording.repeat(inputs, addresses)
        return run(self.saved(tensors)) if found is None else found
