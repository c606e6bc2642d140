"""What a module's forward does, as a graph of torch.fx, or the reason why that cannot be known for sure.

torch.fx runs the forward once, on stand-ins for its inputs, and writes down what happens to these. It misses whatever
else the forward does or depends on. So it is watched meanwhile, and a graph is given out only if the forward

- does the same with gradients and without, with autocast and without, and switches none of them, nor checkpointing;
- neither reads the mode nor asks how it is run, for types, or for attributes that tensors do not have;
- catches no exceptions, prints nothing, and neither draws random numbers in Python nor writes attributes or globals;
- reads no attribute, global or outer variable that can change unseen: of plain values, which are compared again before
  the graph is used, functions, classes and modules alone.

Reed et al. 2022, torch.fx, arXiv:2112.08429.
"""

import builtins
import dis
import inspect
import operator
import random
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial, partialmethod
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.proxy import Attribute

# Who may look at the type of a stand-in: torch.fx itself, and what sets a module's attribute, which is noticed.
TRUSTED = ("torch.fx", "torch.utils._pytree", "torch.overrides", "torch.nn.modules.module", "torch.nn.parameter")
# Whose code is not looked at, but for what it does to stand-ins.
LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "resnet_fast"}
DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
# Whose modules are called as they are. Ours are fused already.
FOREIGN = ("torch.nn.", "torch.jit.", "torch.distributed.")
CLOSED = (*FOREIGN, "resnet_fast.")

# Plain values, and what is called but hardly ever changed.
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.memory_format)
CALLABLE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, type, partial, nn.Module)
# Every module's own attributes, of which a forward may read all but the mode.
OWN = frozenset(dir(nn.Module)) | frozenset(vars(nn.Module())) - {"training"}
# Names in the code of a forward, and what it does with them.
QUESTIONS = {
    **dict.fromkeys(("type", "__class__", "hasattr", "vars"), "asks for the types or attributes of values"),
    **dict.fromkeys(("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"), "asks how it is run"),
    **dict.fromkeys(("is_fx_tracing", "is_fx_symbolic_tracing", "is_tracing", "is_compiling"), "asks how it is run"),
    **dict.fromkeys(("is_in_onnx_export", "is_initialized", "is_available", "backends"), "asks how it is run"),
    **dict.fromkeys(("environ", "getenv", "get_default_dtype", "time", "perf_counter"), "asks how it is run"),
    **dict.fromkeys(("print", "open", "input"), "prints or reads"),
    **dict.fromkeys(("exec", "globals", "locals", "functional_call", "apply"), "runs what a graph does not show"),
}
# Of a tensor's attributes, besides its methods, what a graph can hold. None of them may be None.
ATTRIBUTES = ("shape", "dtype", "device", "layout", "ndim", "data", "T", "mT", "H", "mH", "requires_grad", "is_cuda")
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


class Setting(NamedTuple):
    """What a forward has read: an attribute of a module, or a global variable of a namespace."""

    owner: Any
    name: str
    value: Any

    def holds(self) -> bool:
        """Whether it is still the same."""
        if isinstance(self.owner, dict):
            now = self.owner.get(self.name, Setting)
        else:
            now = getattr(self.owner, self.name, Setting)
        return now is self.value or (type(now) is type(self.value) and now == self.value)


class Traced(NamedTuple):
    """The graph of a forward, and what else it depends on."""

    graph: fx.Graph
    settings: tuple[Setting, ...]


class UntraceableError(Exception):
    """The message says why the graph of a forward would not be what the forward does."""


class _Proxy(fx.Proxy):
    """torch.fx's stand-in, which would write `x += y` down as `x + y`, and have and take any attribute."""

    def in_place(self, function: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __getattr__(self, k: str) -> Any:
        if not callable(getattr(Tensor, k, None)) and k not in ATTRIBUTES:
            raise UntraceableError(f"its forward asks a value for {k!r}, which not every tensor has")
        return _Attribute(self, k)  # type: ignore[call-arg, arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        if not _is_trusted(sys._getframe(1)):
            raise UntraceableError(f"its forward sets {name} of a value")
        super().__setattr__(name, value)

    def __hash__(self) -> int:
        return self._unless_asked("looks for a value in a set or dict", id(self))

    def __repr__(self) -> str:
        return self._unless_asked("makes text of a value", "a stand-in")

    __str__ = __repr__

    def __format__(self, form: str) -> str:
        return self._unless_asked("makes text of a value", "a stand-in")

    @staticmethod
    def _unless_asked(does: str, answer: Any) -> Any:
        if not _is_trusted(sys._getframe(2)):
            raise UntraceableError(f"its forward {does}")
        return answer


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", partialmethod(_Proxy.in_place, getattr(operator, _name)))


class _Value(_Proxy):
    """What the forward computes; whether it is a tensor is not known."""

    @property
    def __class__(self) -> type:  # what isinstance looks at, after type()
        frame = sys._getframe(1)
        if not _is_trusted(frame) and _asks_for_types(frame.f_code):
            raise UntraceableError("its forward asks for the type of an intermediate value")
        return _Value


class _Attribute(_Value, Attribute):
    """An attribute of a stand-in, or a method of it that is about to be called."""


class _Input(_Proxy):
    """An input of the forward: a tensor, which is checked again whenever the graph is used."""

    @property
    def __class__(self) -> type:
        # Not to torch's own functions, some of which would hand it over to C as a tensor.
        return _Input if sys._getframe(1).f_globals.get("__name__", "").startswith("torch.") else Tensor


STAND_INS = (_Value, _Attribute, _Input)


def _is_trusted(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith((*TRUSTED, __name__))


def _asks_for_types(code: CodeType) -> bool:
    """Whether a function may have asked itself, and not a function of torch that is written in C."""
    return "isinstance" in code.co_names or any(i.opname == "MATCH_CLASS" for i in dis.get_instructions(code))


class _Tracer(fx.Tracer):
    """torch.fx's tracer, which calls modules without children, those of torch.nn, and the opaque ones, as they are.

    `frozen`: what is read will not change, so that mode and settings are what they are now.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        opaque: Collection[nn.Module] = (),
        traced_method: str = "forward",
        closed: tuple[str, ...] = CLOSED,
        frozen: bool = False,
    ) -> None:  # defaults: torch.fx makes one when it unpickles a GraphModule
        super().__init__()
        self.opaque, self.closed, self.frozen = opaque, closed, frozen
        self.traced_func_name = traced_method
        self.context = _context()
        self.settings: dict[tuple[int, str], Setting] = {}
        self.screened: set[CodeType] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_container(m, self.closed) or m in self.opaque

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        # Not `forward`, which runs the hooks of the module: these are not to see stand-ins.
        return super().call_module(m, m.forward, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        if type(a) in STAND_INS:  # torch.fx would ask for types
            return a.node
        if isinstance(a, dict | list) and type(a) not in (dict, list, immutable_dict, immutable_list):
            raise UntraceableError(f"its forward makes a {type(a).__name__}, which torch.fx makes a plain one")
        return super().create_arg(a)

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

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See every attribute of a module that is read, and every function before it runs."""
        tracer, before = self, sys.getprofile()

        def read(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if name not in OWN and not name.startswith("__"):
                tracer.note_attribute(module, name, value)
            return value

        def called(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call" and frame.f_code not in tracer.screened:
                tracer.screened.add(frame.f_code)
                tracer.screen(frame)

        def write(module: nn.Module, name: str, value: Any = None) -> None:
            raise UntraceableError(f"its forward writes attributes of modules ({name})")

        originals = {name: getattr(nn.Module, name) for name in ("__setattr__", "__delattr__")}
        nn.Module.__getattribute__ = read  # type: ignore[method-assign]
        nn.Module.__setattr__ = nn.Module.__delattr__ = write  # type: ignore[method-assign]
        sys.setprofile(called)
        try:
            yield
        finally:
            sys.setprofile(before)
            del nn.Module.__getattribute__
            for name, original in originals.items():
                setattr(nn.Module, name, original)

    def note_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            raise UntraceableError(f"its forward reads {name}, a tensor that is neither parameter nor buffer")
        if isinstance(value, GENERATORS):
            raise UntraceableError(f"its forward draws random numbers from {name}")
        if self.frozen:
            return
        if name == "training":
            raise UntraceableError("its forward depends on the mode")
        self.note(module, name, value)

    def note(self, owner: Any, name: str, value: Any) -> None:
        if not _is_plain(value) and not isinstance(value, CALLABLE):
            raise UntraceableError(f"its forward reads {name}, which may change unseen ({type(value).__name__})")
        if not isinstance(value, MethodType):  # of the module's class, made anew each time
            self.settings[id(owner), name] = Setting(owner, name, value)

    def screen(self, frame: FrameType) -> None:
        """Refuse a function of the forward whose code does what a graph would not show."""
        code, namespace = frame.f_code, frame.f_globals
        library, _, _ = namespace.get("__name__", "").partition(".")
        if library in LIBRARIES:
            return
        opcodes = [instruction.opname for instruction in dis.get_instructions(code)]
        if opcodes.count("PUSH_EXC_INFO") > opcodes.count("WITH_EXCEPT_START"):
            raise UntraceableError("its forward catches exceptions")
        if "STORE_GLOBAL" in opcodes or "DELETE_GLOBAL" in opcodes:
            raise UntraceableError("its forward writes global variables")
        if _compares_a_variable_with_none(code):
            raise UntraceableError("its forward asks whether a value is None")
        for name in code.co_names:
            if name in QUESTIONS:
                raise UntraceableError(f"its forward {QUESTIONS[name]} ({name})")
        for name in code.co_freevars:
            if name != "__class__" and not isinstance(frame.f_locals.get(name), CALLABLE):
                raise UntraceableError(f"its forward reads {name}, a variable of the function around it")
        if not self.frozen:
            for instruction in dis.get_instructions(code):
                name = instruction.argval
                if instruction.opname == "LOAD_GLOBAL" and (name in namespace or not hasattr(builtins, name)):
                    self.note(namespace, name, namespace.get(name))


def _compares_a_variable_with_none(code: CodeType) -> bool:
    """Whether that is so of a local variable: a stand-in is never None, what an opaque module returns may be."""
    instructions = list(dis.get_instructions(code))
    for i, instruction in enumerate(instructions):
        if instruction.opname == "IS_OP" or instruction.opname.endswith(("_IF_NONE", "_IF_NOT_NONE")):
            operands = instructions[max(i - 2, 0) : i] if instruction.opname == "IS_OP" else instructions[i - 1 : i]
            if any(operand.opname.startswith("LOAD_FAST") for operand in operands):
                return True
    return False


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


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
    frozen: bool = False,
    closed: tuple[str, ...] = CLOSED,
) -> Traced:
    """Return the graph of a module's forward, with the modules within as `call_module` nodes or looked into.

    Args:
        module: a container; nothing in it is changed.
        opaque: modules within that are called as a whole.
        traced_method: name of the method of its class to look at.
        frozen: of evaluation alone, with mode and settings as they are now.
        closed: beginnings of the names of Python modules whose classes are called as they are.

    Raises:
        UntraceableError: the graph would not say for sure what the forward does.
    """
    if "forward" in module.__dict__:
        raise UntraceableError("its forward is patched")
    if isinstance(module, fx.GraphModule) and not frozen:  # it makes its class itself, and again for each copy
        raise UntraceableError("it is a GraphModule; the model that it was made of can be converted")
    found = []
    for with_gradients in (True, False):
        with _left_as_it_was(module), torch.set_grad_enabled(with_gradients), _autocast(not with_gradients):
            tracer = _Tracer(opaque, traced_method, closed, frozen)
            try:
                with tracer.watching():
                    graph = tracer.trace(module)
                _check_constants(graph)
            except UntraceableError:
                raise
            except Exception as error:  # the forward is anybody's code, and may fail on stand-ins in any way
                reason = " ".join(str(error).split())[:80]
                raise UntraceableError(f"torch.fx cannot follow its forward ({reason})") from error
            found.append(Traced(graph, tuple(tracer.settings.values())))
    if str(found[0].graph) != str(found[1].graph):
        raise UntraceableError("its forward depends on gradients or autocast")
    return found[0]


def _check_constants(graph: fx.Graph) -> None:
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise UntraceableError("its forward computes a tensor that does not depend on its input")


def _required_parameters(function: Any) -> list[str]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    names = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UntraceableError(f"its forward takes any arguments (*{parameter.name})")
        if parameter.default is not parameter.empty and not _is_plain(parameter.default):
            raise UntraceableError(f"its forward has a default of {parameter.name} that may change")
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
    """Undo what the forward does to attributes and random states, and refuse it.

    Raises:
        UntraceableError: attributes of modules changed, or random numbers were drawn.
    """
    attributes = {inner: _shallow_copy(vars(inner)) for inner in module.modules()}
    random_states = _random_states()
    wrote = False
    try:
        yield
    finally:
        for inner, before in attributes.items():
            wrote |= _restore(vars(inner), before)
        drew = _random_states() != random_states
        if drew:
            python_state, numpy_state, torch_state = random_states
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_rng_state(torch.tensor(torch_state, dtype=torch.uint8))
    if wrote:
        raise UntraceableError("its forward writes attributes of modules")
    if drew:
        raise UntraceableError("its forward draws random numbers in Python")


def _random_states() -> tuple[Any, Any, Any]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), (kind, tuple(keys), *rest), torch.get_rng_state().tolist()


def _shallow_copy(attributes: dict[str, Any]) -> dict[str, Any]:
    """Each attribute; beside the dicts that hold a module's parameters, buffers, modules and hooks, what is in them."""
    return {
        name: (value, value.copy() if name in OWN and isinstance(value, dict) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> bool:
    """Set all back, and return whether anything had changed."""
    changed = list(attributes) != list(before)
    for name, (value, contents) in before.items():
        changed |= attributes.get(name) is not value
        if contents is not None and not _same(value, contents):
            changed = True
            value.clear()
            value.update(contents)
    if changed:
        attributes.clear()
        attributes.update({name: value for name, (value, _) in before.items()})
    return changed


def _same(now: dict, then: dict) -> bool:
    return list(now) == list(then) and all(now[name] is then[name] for name in then)
