"""Record a user's training step as CUDA graphs.

    def train_step(images, labels):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    train_step = graphed(train_step, model, optimizer)
    for images, labels in loader:
        loss = train_step(images, labels)
        scheduler.step()

The first call of each kind runs unchanged: compilers and cuDNN choose, and the optimizer creates its state. The
second is recorded, and later ones replay it. Two calls are of one kind if they agree in: shapes, dtypes, strides and
devices of the tensors; values of the other arguments; the optimizers' hyperparameters, the modules' modes and which
weights are trained; autocast and grad modes around the call; which gradients exist, if the function reads any.

A replay runs the recorded kernels on the recorded addresses, and no Python. Therefore arguments are copied into tensors
of the recording, and gradients of another recording to where this one reads them. A learning rate becomes a tensor.
Returned tensors and gradients lie in memory that the next call overwrites.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast.common.checks import check_type, shown
from resnet_fast.data import Batch
from resnet_fast.ops.backend import device_guard
from resnet_fast.training.graph import CudaGraph
from resnet_fast.training.step_state import Snapshot, StepState, add_tensors
from resnet_fast.training.unrecordable import Unrecordable, why_unrecordable

MakeGraph = Callable[[Callable[[], Any]], Callable[[], Any]]
MOST_RECORDINGS = 64
# Immutable values, and objects whose state belongs in `changes`.
PLAIN = (type(None), bool, int, float, str, bytes, Enum, torch.dtype, torch.device)
STATEFUL = (torch.nn.Module, torch.optim.Optimizer, torch.amp.GradScaler)
N_FIRST = 16  # warn after this many consecutive calls of which each is the first of its kind
KIND = "its arguments", "a hyperparameter, a module's mode or which weights are trained", "autocast or the grad mode"


def graphed(
    step: Callable[..., Any],
    *changes: Any,
    fallback: bool = True,
    make_graph: MakeGraph = CudaGraph,
) -> "Graphed":
    """Return `step` as CUDA graphs: on a GPU, each kind of call is recorded once and then replayed.

    Args:
        step: a function that trains on a batch: forward, loss, backward, optimizer, or a part of these. Its arguments
            are tensors on the GPU that need no gradient, plain Python values, modules and optimizers, also in tuples,
            lists and dicts. It may close over tensors that keep their memory. A resident `Batch` is read in place.
        changes: everything that `step` changes: modules, optimizers, enabled gradient scalers, single tensors.
        fallback: if `step` cannot be recorded (on a CPU, with several processes, or because of its code), run it
            unchanged and warn once, with the line and the reason. False: raise RuntimeError instead.
        make_graph: a function that records another, without arguments, as a graph.

    Returns:
        A function that computes the same as `step`, bit for bit if cuDNN is deterministic. Its next call overwrites the
        tensors that it returns, which are detached: clone what you keep. `why_not` is None, or why it is not recorded.

    Raises:
        TypeError: `step` is not callable, `fallback` is not a bool, or `changes` holds another kind of object.
        ValueError: `changes` holds no tensor.
        RuntimeError: a call cannot be recorded, and `fallback` is False.

    Recording leaves `changes`, gradients and random states unchanged. Between calls, set the learning rate by hand or a
    scheduler, to floats or tensors; it is rounded to fp32. Optimizers that have `capturable` are set to it.
    """
    if not callable(step):
        raise TypeError(f"step must be callable, got {type(step).__name__}")
    check_type("fallback", fallback, bool)
    return Graphed(step, StepState(changes), fallback, make_graph)


class _Recorded(NamedTuple):
    """A graph, the tensors that it reads, and the gradients that it leaves."""

    graph: Callable[[], Any]
    arguments: list[Tensor]
    rates: list[Tensor]
    gradients: list[Tensor | None]  # of each parameter, before the call; empty if `step` does not read them
    left: list[Tensor | None]
    addresses: list[int]
    resident: Any  # keeps alive what is read in place


class Graphed:
    """The function that `graphed` returns."""

    def __init__(self, step: Callable[..., Any], state: StepState, fallback: bool, make_graph: MakeGraph) -> None:
        functools.update_wrapper(self, step, updated=())
        self.step, self.state, self.fallback, self.make_graph = step, state, fallback, make_graph
        self.name = getattr(step, "__qualname__", type(step).__name__)
        self.device: torch.device | None = None  # until the first call
        # Calls run one at a time, and each recording holds its results and gradients. So all recordings can share the
        # memory of intermediate results.
        self.pool: Any = None
        self.why_not: str | None = None
        self.recorded: dict[Any, _Recorded] = {}
        self.seen: set[tuple] = set()
        self.last_kind, self.n_first, self.n_grown = ((), (), ()), 0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.device is None:
            self.device = self.state.device
            self._look_for_obstacles()
        tensors: list[Tensor] = []
        kind = None if self.why_not else self._kind(args, kwargs, tensors)
        recorded = None if kind is None else self._find(kind) or self._record(kind, tensors, args, kwargs)
        if recorded is None:
            return _detached(self.step(*args, **kwargs))
        return self._replay(recorded, tensors)

    def _look_for_obstacles(self) -> None:
        if self.state.is_shared:
            self._give_up("several processes exchange their gradients, and a graph needs a single process")
        elif self.make_graph is CudaGraph and self.state.device.type != "cuda":
            self._give_up(f"a graph needs a model on a CUDA device, got {self.state.device}")

    def _give_up(self, why: str, error: BaseException | None = None) -> None:
        """Run `step` unchanged from now on and warn why; without `fallback`, raise RuntimeError."""
        why = f"{self.name} is not recorded as a CUDA graph: {why}"
        if not self.fallback:
            raise RuntimeError(why) from error
        self.why_not = why
        self.recorded.clear()
        warnings.warn(f"{why}. The step runs without a graph.", RuntimeWarning, stacklevel=4)

    def _kind(self, args: tuple, kwargs: dict, tensors: list[Tensor]) -> tuple | None:
        """Return the kind of a call, None if it cannot be recorded, and append the arguments' tensors to `tensors`."""
        assert self.device is not None
        device = self.device.type
        around = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        around += torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        try:
            kind = _kind_of((args, kwargs), tensors)
            for tensor in tensors:
                if tensor.device != self.device:
                    raise TypeError(f"tensor arguments must be on {self.device}, got one on {tensor.device}")
            return kind, self.state.settings(), around
        except TypeError as error:
            self._give_up(str(error))
            return None

    def _find(self, kind: tuple) -> _Recorded | None:
        recorded = self.recorded.get(kind) or self.recorded.get((kind, self.state.has_gradients()))
        if recorded is not None and recorded.addresses != self.state.addresses():  # the weights have moved
            self.recorded.clear()
            return None
        return recorded

    def _make(self, run: Callable[[], Any]) -> Callable[[], Any]:
        if self.make_graph is not CudaGraph:
            return self.make_graph(run)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        return CudaGraph(run, pool=self.pool)

    def _is_first(self, kind: tuple) -> bool:
        """Return whether a call is the first of its kind; warn if kinds never seem to repeat."""
        if kind in self.seen:
            return False
        if len(self.seen) == 1000:
            self.seen.clear()
        self.seen.add(kind)
        self.n_first += 1
        if self.n_first == N_FIRST:
            changed = [name for name, new, old in zip(KIND, kind, self.last_kind, strict=True) if new != old]
            text = f"each of {N_FIRST} calls of {self.name} in a row differs in {' and '.join(changed)}"
            warnings.warn(f"{text}, so that none was recorded as a CUDA graph", RuntimeWarning, stacklevel=4)
        self.last_kind = kind
        return True

    def _record(self, kind: tuple, tensors: list[Tensor], args: tuple, kwargs: dict) -> _Recorded | None:
        """Record a call and undo the effects of its warm-up; return None if the call has to run unchanged."""
        outside = sys.exc_info()[1]  # an exception that the caller is handling, not a reason of ours
        self.state.make_capturable()
        if self._is_first(kind):
            return None
        self.state.find_parameters()
        static = [tensor.detach().clone() for tensor in tensors]
        rest = iter(static)
        static_args, static_kwargs = _map((args, kwargs), lambda _: next(rest))
        state, is_warm = self.state, False
        gradients = [parameter.grad for parameter in state.parameters]
        watch = _Watch([gradient for gradient in gradients if gradient is not None])

        def run() -> Any:
            nonlocal is_warm
            for parameter, gradient in zip(state.parameters, gradients, strict=True):
                parameter.grad = gradient
            torch.clear_autocast_cache()  # of an autocast around the call, so that each replay casts the weights
            with nullcontext() if is_warm else watch:
                is_warm = True
                return _detached(self.step(*static_args, **static_kwargs))

        try:
            with Snapshot(state) as snapshot, device_guard(snapshot.values[0].tensor):
                rates = snapshot.make_rates_tensors()
                graph = self._make(run)
                left = [parameter.grad for parameter in state.parameters]
                snapshot.check_nothing_is_replaced()
                has_grown = snapshot.has_new_state()
                if has_grown and self.n_grown == 3:
                    raise Unrecordable("it makes new state in every call")
        except Exception as error:
            self._give_up(why_unrecordable(error, outside), error)
            return None
        finally:
            torch.clear_autocast_cache()
        if has_grown:  # this call runs unchanged and creates the state; the next one is recorded
            self.n_grown += 1
            return None
        is_read = watch.has_seen or any(
            new is not None and new is old for new, old in zip(left, gradients, strict=True)
        )
        if is_read or not watch.tensors:
            kind = kind, state.has_gradients()
        else:
            gradients = []
        recorded = _Recorded(graph, static, rates, gradients, left, state.addresses(), (static_args, static_kwargs))
        if len(self.recorded) == MOST_RECORDINGS:  # each holds results and gradients
            del self.recorded[next(iter(self.recorded))]
        self.recorded[kind] = recorded
        return recorded

    @torch.no_grad()
    def _replay(self, recorded: _Recorded, tensors: list[Tensor]) -> Any:
        self.n_first = 0
        for static, tensor in zip(recorded.arguments, tensors, strict=True):
            static.copy_(tensor)
        for group, rate in zip(self.state.rated_groups(), recorded.rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
        if recorded.gradients:
            pairs = zip(recorded.gradients, [parameter.grad for parameter in self.state.parameters], strict=True)
            moved = [(static, given) for static, given in pairs if static is not None and static is not given]
            if moved:
                torch._foreach_copy_(*map(list, zip(*moved, strict=True)))  # type: ignore[attr-defined]
        result = recorded.graph()
        for parameter, gradient in zip(self.state.parameters, recorded.left, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient
        torch.clear_autocast_cache()
        return result


class _Watch(TorchDispatchMode):
    """Notices whether an operator receives one of the given tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors, self.has_seen = tensors, False
        self.addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.addresses and not self.has_seen:
            got: list[Tensor] = []
            add_tensors((args, kwargs), got)
            self.has_seen = any(tensor.untyped_storage().data_ptr() in self.addresses for tensor in got)
        return func(*args, **(kwargs or {}))


def _kind_of(value: Any, tensors: list[Tensor]) -> Any:
    """Return the kind of an argument, hashable, and append its tensors that a replay copies to `tensors`."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError("arguments must not require a gradient, which a replay would not compute; detach them")
        tensors.append(value)
        return value.shape, value.dtype, value.stride(), value.device
    if isinstance(value, Batch) and value.is_resident:
        return value.images.data_ptr(), value.labels.data_ptr(), len(value.images), _kind_of(value.plan, tensors)
    if type(value) in (tuple, list) or hasattr(value, "_fields"):
        return type(value), *[_kind_of(part, tensors) for part in value]
    if type(value) is dict:
        return dict, *[(name, _kind_of(part, tensors)) for name, part in value.items()]
    if not isinstance(value, PLAIN + STATEFUL):
        rule = "arguments must be tensors, numbers, strings, modules, optimizers, or tuples, lists and dicts of them"
        raise TypeError(f"{rule}, got {shown(value)}; the function may close over other objects")
    return type(value), value


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with `function` applied to the tensors that `_kind_of` appends."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Batch) and value.is_resident:
        return value._replace(plan=function(value.plan))
    if type(value) in (tuple, list) or hasattr(value, "_fields"):
        parts = [_map(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)  # type: ignore[call-arg]
    if type(value) is dict:
        return {name: _map(part, function) for name, part in value.items()}
    return value


def _detached(value: Any) -> Any:
    return _map(value, Tensor.detach)
