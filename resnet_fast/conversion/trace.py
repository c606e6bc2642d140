"""What a module's forward does, as a graph of torch.fx, or the reason why that cannot be known for sure.

torch.fx runs the forward once, on stand-ins for its inputs, and writes down what happens to these. It misses whatever
else the forward does or depends on. A graph is given out only if none of the following was seen:

- anything that differs between training and evaluation, gradients or none, autocast or none: both are traced;
- a switch of gradients, autocast or saved-tensor hooks (checkpointing) within the forward;
- random numbers drawn, or attributes of modules written, by Python rather than by the graph;
- a question for the type of a value that is not an input.

Reed et al. 2022, torch.fx, arXiv:2112.08429.
"""

import dis
import inspect
import operator
import random
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partialmethod
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

# Who may look at the type of a stand-in: torch.fx itself, and what sets a module's attribute, which is noticed.
TRUSTED = ("torch.fx", "torch.utils._pytree", "torch.overrides", "torch.nn.modules.module", "torch.nn.parameter")
TYPE_QUESTIONS = {"isinstance", "__class__"}
DEVICE_TYPES = ("cpu", "cuda")
# Whose modules are called as they are. Ours are fused already.
FOREIGN = ("torch.nn.", "torch.jit.", "torch.distributed.")
CLOSED = (*FOREIGN, "resnet_fast.")


class UntraceableError(Exception):
    """The message says why the graph of a forward would not be what the forward does."""


class _Proxy(fx.Proxy):
    """torch.fx's stand-in, which would write `x += y` down as `x + y`."""

    def in_place(self, function: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", partialmethod(_Proxy.in_place, getattr(operator, _name)))


class _Value(_Proxy):
    """What the forward computes; whether it is a tensor is not known."""

    @property
    def __class__(self) -> type:  # what isinstance looks at, after type()
        frame = sys._getframe(1)
        if not frame.f_globals.get("__name__", "").startswith(TRUSTED) and _asks_for_types(frame.f_code):
            raise UntraceableError("its forward asks for the type of an intermediate value")
        return _Value


def _asks_for_types(code: CodeType) -> bool:
    """Whether a function may have asked itself, and not a function of torch that is written in C."""
    return not TYPE_QUESTIONS.isdisjoint(code.co_names) or any(
        instruction.opname == "MATCH_CLASS" for instruction in dis.get_instructions(code)
    )


class _Input(_Proxy):
    """An input of the forward: a tensor, which is checked again whenever the graph is used."""

    @property
    def __class__(self) -> type:
        frame = sys._getframe(1)
        # Not to torch's own functions, some of which would hand it over to C as a tensor.
        is_torchs = frame.f_globals.get("__name__", "").startswith("torch.")
        return _Input if is_torchs else Tensor


class _Tracer(fx.Tracer):
    """torch.fx's tracer, which calls modules without children, those of torch.nn, and the opaque ones, as they are."""

    proxy_buffer_attributes = True

    def __init__(
        self, opaque: Collection[nn.Module] = (), traced_method: str = "forward", closed: tuple[str, ...] = CLOSED
    ) -> None:  # defaults: torch.fx makes one when it unpickles a GraphModule
        super().__init__()
        self.opaque, self.closed = opaque, closed
        self.traced_func_name = traced_method
        self.context = _context()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_container(m, self.closed) or m in self.opaque

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        # Not `forward`, which runs the hooks of the module: these are not to see stand-ins.
        return super().call_module(m, m.forward, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) in (_Value, _Input) else super().create_arg(a)  # which asks for types

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Inputs are the parameters without a default; the others stay at theirs, also when the graph is used."""
        names = _required_parameters(root_fn)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.context:
            raise UntraceableError("its forward switches gradients, autocast or checkpointing on or off")
        return super().create_node(kind, *args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Input(node, self) if node.op == "placeholder" else _Value(node, self)


def is_container(module: nn.Module, closed: tuple[str, ...] = CLOSED) -> bool:
    """Whether the forward of a module is to be looked into, as far as the module itself tells."""
    if type(module) is nn.Sequential:  # an empty one, too: it is a shortcut that gives its input itself
        return True
    return bool(module._modules) and not type(module).__module__.startswith(closed)


def trace(
    module: nn.Module,
    opaque: Collection[nn.Module],
    *,
    traced_method: str = "forward",
    modes: tuple[bool, ...] = (True, False),
    closed: tuple[str, ...] = CLOSED,
) -> fx.Graph:
    """Return the graph of a module's forward, with the modules within as `call_module` nodes or looked into.

    Args:
        module: a container; nothing in it is changed.
        opaque: modules within that are called as a whole.
        traced_method: name of the method of its class to look at.
        modes: training, evaluation, or both, which must agree.
        closed: beginnings of the names of Python modules whose classes are called as they are.

    Raises:
        UntraceableError: the graph would not say for sure what the forward does.
    """
    if "forward" in module.__dict__:
        raise UntraceableError("its forward is patched")
    if isinstance(module, fx.GraphModule):  # which makes its class itself, and again for each copy
        raise UntraceableError("it is a GraphModule; the model that it was made of can be converted")
    graphs = []
    for training in modes:
        with _left_as_it_was(module), torch.set_grad_enabled(training), _autocast(not training):
            for inner in module.modules():
                inner.training = training
            try:
                graphs.append(_Tracer(opaque, traced_method, closed).trace(module))
                _check_constants(graphs[-1])
            except UntraceableError:
                raise
            except Exception as error:  # the forward is anybody's code, and may fail on stand-ins in any way
                reason = " ".join(str(error).split())[:80]
                raise UntraceableError(f"torch.fx cannot follow its forward ({reason})") from error
    if str(graphs[0]) != str(graphs[-1]):
        raise UntraceableError("its forward depends on the mode (training, gradients or autocast)")
    return graphs[0]


def _check_constants(graph: fx.Graph) -> None:
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise UntraceableError("its forward computes a tensor that does not depend on its input")


def _required_parameters(function: Any) -> list[str]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    names = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UntraceableError(f"its forward takes any arguments (*{parameter.name})")
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise UntraceableError(f"its forward needs the keyword {parameter.name}")
            names.append(parameter.name)
    return names


def _context() -> tuple[Any, ...]:
    """What decides, beside a graph, how its operations are run."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device_type) for device_type in DEVICE_TYPES),
        *(torch.get_autocast_dtype(device_type) for device_type in DEVICE_TYPES),
        torch._C._autograd._top_saved_tensors_default_hooks(True),  # type: ignore[attr-defined]
    )


@contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    """The switches alone: torch.autocast would look for the device."""
    before = [torch.is_autocast_enabled(device_type) for device_type in DEVICE_TYPES]
    try:
        for device_type in DEVICE_TYPES:
            torch.set_autocast_enabled(device_type, enabled)
        yield
    finally:
        for device_type, was_enabled in zip(DEVICE_TYPES, before, strict=True):
            torch.set_autocast_enabled(device_type, was_enabled)


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Undo what the forward does to Python's objects, modes and random states, and refuse it unless it is modes alone.

    Raises:
        UntraceableError: attributes of modules changed, or random numbers were drawn.
    """
    modes = {inner: inner.training for inner in module.modules()}
    attributes = {inner: _shallow_copy(vars(inner)) for inner in modes}
    random_states = _random_states()
    changed = False
    try:
        yield
    finally:
        for inner, training in modes.items():
            inner.training = training
        for inner, before in attributes.items():
            changed |= _restore(vars(inner), before)
        drew = _random_states() != random_states
        if drew:
            python_state, numpy_state, torch_state = random_states
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_rng_state(torch.tensor(torch_state, dtype=torch.uint8))
    if changed:
        raise UntraceableError("its forward writes attributes of modules")
    if drew:
        raise UntraceableError("its forward draws random numbers in Python")


def _random_states() -> tuple[Any, Any, Any]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), (kind, tuple(keys), *rest), torch.get_rng_state().tolist()


def _shallow_copy(attributes: dict[str, Any]) -> dict[str, Any]:
    """Each attribute, with a copy beside it of what a forward might fill."""
    return {
        name: (value, value.copy() if isinstance(value, dict | list | set) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> bool:
    """Set all back, and return whether anything had changed."""
    changed = list(attributes) != list(before)
    for name, (value, contents) in before.items():
        changed |= attributes.get(name) is not value
        if contents is not None and not _same_contents(value, contents):
            changed = True
            value.clear()
            value.extend(contents) if isinstance(value, list) else value.update(contents)
    if changed:
        attributes.clear()
        attributes.update({name: value for name, (value, _) in before.items()})
    return changed


def _same_contents(value: Any, copy: Any) -> bool:
    if len(value) != len(copy):
        return False
    if isinstance(value, dict):
        return all(name in value and value[name] is item for name, item in copy.items())
    if isinstance(value, set):
        return value == copy
    return all(a is b for a, b in zip(value, copy, strict=True))
