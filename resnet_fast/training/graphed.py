"""Records a user's training step as CUDA graphs.

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

The first call of each kind runs unchanged: compilers and cuDNN choose, the optimizer makes its state. The second is
recorded, and replayed from then on. A kind is: shapes, types, strides and devices of the tensors; the values of the
other arguments; the optimizers' hyperparameters, the modules' modes and which weights are trained; autocast around the
call; whether there are gradients, if the function does not begin by dropping them.

A replay runs the kernels that were recorded on the addresses that were recorded, and no Python. So arguments are copied
into tensors that stay, gradients of another recording are copied to where this one reads them, a learning rate becomes
a tensor while the function is recorded, and what is returned and the gradients left behind lie where the next call
writes.
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
# Values that do not change, and objects whose state `changes` hold.
PLAIN = (type(None), bool, int, float, str, bytes, Enum, torch.dtype, torch.device)
STATEFUL = (torch.nn.Module, torch.optim.Optimizer, torch.amp.GradScaler)
N_FIRST = 16  # calls in a row of which each is the first of its kind: then something is said
KIND = "its arguments", "a hyperparameter, a module's mode or which weights are trained", "autocast or the grad mode"


def graphed(
    step: Callable[..., Any],
    *changes: Any,
    fallback: bool = True,
    make_graph: MakeGraph = CudaGraph,
) -> "Graphed":
    """Return `step` as CUDA graphs: on a GPU recorded once for each kind of call, then replayed.

    Args:
        step: trains on a batch: forward, loss, backward, optimizer, or a part of these. Its arguments are tensors on
            the GPU (also in tuples, lists and dicts), which it may not train, and hashable values of Python. It may
            close over tensors that stay where they are; images and labels of a resident `Batch` stay, too.
        changes: everything that it changes: modules, optimizers, enabled gradient scalers, single tensors.
        fallback: where `step` cannot be recorded (on a CPU, with several processes, or for what it does), run it as it
            is and warn once, with the line and the reason. False: raise that as an error.
        make_graph: records a function without arguments.

    Returns:
        A function that computes what `step` does, to the bit if cuDNN is deterministic. Tensors that it returns are
        detached and overwritten by its next call: clone what is kept. `why_not` is the reason why it is not recorded.

    Raises:
        TypeError, ValueError: `step` is no function, or `changes` hold no tensor or something else.
        RuntimeError: from a call, without `fallback`.

    Recording leaves `changes`, gradients and random states as they were. Between calls the learning rate may be set, by
    hand or a scheduler, to floats or tensors; it is rounded to fp32. Optimizers that have `capturable` get it.
    """
    if not callable(step):
        raise TypeError(f"step must be callable, got {type(step).__name__}")
    check_type("fallback", fallback, bool)
    return Graphed(step, StepState(changes), fallback, make_graph)


class _Recorded(NamedTuple):
    """A graph, the tensors that it reads, and those that it leaves as gradients."""

    graph: Callable[[], Any]
    arguments: list[Tensor]
    rates: list[Tensor]
    gradients: list[Tensor | None]  # from before, of each parameter; none if they are dropped unread
    left: list[Tensor | None]
    addresses: list[int]
    resident: Any  # what is read where it is must stay


class Graphed:
    """What `graphed` returns."""

    def __init__(self, step: Callable[..., Any], state: StepState, fallback: bool, make_graph: MakeGraph) -> None:
        functools.update_wrapper(self, step, updated=())
        self.step, self.state, self.fallback, self.make_graph = step, state, fallback, make_graph
        self.name = getattr(step, "__qualname__", type(step).__name__)
        self.device: torch.device | None = None  # until the first call
        # One call runs at a time, and what a recording returns and leaves behind is held by it: all others can use the
        # memory of its intermediate results.
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
            self._give_up(f"a graph needs a model on a CUDA device, and it is on {self.state.device}")

    def _give_up(self, why: str, error: BaseException | None = None) -> None:
        """Run `step` as it is from now on, and say why; or raise it."""
        why = f"{self.name} is not recorded as a CUDA graph: {why}"
        if not self.fallback:
            raise RuntimeError(why) from error
        self.why_not = why
        self.recorded.clear()
        warnings.warn(f"{why}. The step runs without a graph.", RuntimeWarning, stacklevel=4)

    def _kind(self, args: tuple, kwargs: dict, tensors: list[Tensor]) -> tuple | None:
        """Return what a recording depends on, and append the arguments' tensors."""
        assert self.device is not None
        device = self.device.type
        around = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        around += torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        try:
            kind = _kind_of((args, kwargs), tensors)
            for tensor in tensors:
                if tensor.device != self.device:
                    raise TypeError(f"an argument is on {tensor.device}, and must be on {self.device}; move it there")
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
        """Whether there was no such call yet; warn if there never seem to be two of a kind."""
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
        """Record a call, and undo what its warm-up did; return None if the call has to run as it is."""
        outside = sys.exc_info()[1]  # which is no reason of ours
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
            torch.clear_autocast_cache()  # of autocast around the call: each replay casts the weights anew
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
        if has_grown:  # the call makes it, as it should be made, and the next one is recorded
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
        if len(self.recorded) == MOST_RECORDINGS:  # each holds what it returns, and gradients
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
    """Sees whether an operator gets one of some tensors."""

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
    """Return what is recorded of a value, hashable, and append the tensors in it that are copied."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError("an argument requires a gradient, which a replay would not give it; detach it before")
        tensors.append(value)
        return value.shape, value.dtype, value.stride(), value.device
    if isinstance(value, Batch) and value.is_resident:
        return value.images.data_ptr(), value.labels.data_ptr(), len(value.images), _kind_of(value.plan, tensors)
    if type(value) in (tuple, list) or hasattr(value, "_fields"):
        return type(value), *[_kind_of(part, tensors) for part in value]
    if type(value) is dict:
        return dict, *[(name, _kind_of(part, tensors)) for name, part in value.items()]
    if not isinstance(value, PLAIN + STATEFUL):
        rule = "arguments must be tensors, numbers, texts, modules, optimizers, or tuples, lists and dicts of them"
        raise TypeError(f"{rule}, got {shown(value)}; the function may close over other objects")
    return type(value), value


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with other tensors in place of those that `_kind_of` appends."""
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
