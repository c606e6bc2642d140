"""Watch what a forward reads, writes, asks and draws, besides computing, while torch.fx traces it."""

import builtins
import dis
import inspect
import operator
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stand_ins import STAND_INS, UntraceableError

# Packages whose code is not screened; the stand-ins see what it does to them.
LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "resnet_fast"}
# Plain values, and things that are called but hardly ever changed.
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.memory_format)
CALLABLE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, type, partial, nn.Module)
# The attributes of every module; a forward may read all of them except the mode.
OWN = frozenset(dir(nn.Module)) | frozenset(vars(nn.Module())) - {"training"}
# Questions that torch.fx's tracing answers as eager does; torch.jit.is_scripting() is never true in Python.
EAGER = "is_tracing _get_tracing_state is_compiling is_dynamo_compiling is_exporting is_in_onnx_export".split()
# Questions that a frozen forward may ask, because their answers stay the same.
FROZEN = frozenset((*EAGER, "hasattr"))
# Names in the code of a forward, and what it does with them.
QUESTIONS = {
    **dict.fromkeys(("type", "__class__", "vars", "builtins", "hasattr"), "asks for types or attributes"),
    **dict.fromkeys(("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"), "asks how it is run"),
    **dict.fromkeys(("is_fx_tracing", "is_fx_symbolic_tracing", *EAGER), "asks how it is run"),
    **dict.fromkeys(("is_initialized", "is_available", "backends"), "asks how it is run"),
    **dict.fromkeys(("environ", "getenv", "get_default_dtype", "time", "perf_counter"), "asks how it is run"),
    **dict.fromkeys(("print", "open", "input"), "prints or reads"),
    "suppress": "catches exceptions",
    **dict.fromkeys(("exec", "globals", "locals", "functional_call", "apply"), "runs what a graph does not show"),
}
# Flags of functions that accept any arguments, or are generators.
MAY_BE_GIVEN = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
# Modules whose outputs are never None.
GIVE_TENSORS = (nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


class Setting(NamedTuple):
    """An attribute of a module or a global variable of a namespace that a forward has read."""

    owner: Any
    name: str
    value: Any

    def holds(self) -> bool:
        """Return whether the attribute or variable still has this value."""
        # None if it was deleted, or did not exist yet.
        now = self.owner.get(self.name) if isinstance(self.owner, dict) else getattr(self.owner, self.name, None)
        return now is self.value or (type(now) is type(self.value) and now == self.value)


class Watch:
    """An observer of a forward being traced, which raises UntraceableError for anything that a graph would not show.

    Args:
        frozen: whether to assume that mode and settings will not change.
    """

    def __init__(self, frozen: bool) -> None:
        self.frozen = frozen
        self.settings: dict[tuple[int, str], Setting] = {}
        self.screened: dict[CodeType, tuple[str, ...]] = {}
        self.made: set[nn.Module] = set()  # the nn.ReLUs that the forward makes

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch every read of a module's attribute, and every function before it runs."""
        watch, before = self, sys.getprofile()

        def read(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if name not in OWN and not name.startswith("__") and module not in watch.made:
                watch.note_attribute(module, name, value)
            return value

        def called(frame: FrameType, event: str, argument: Any) -> None:
            if event != "call":
                return
            if frame.f_code not in watch.screened:
                watch.screened[frame.f_code] = watch.screen(frame)
            if any(watch.may_be_none(frame.f_locals[name]) for name in watch.screened[frame.f_code]):
                raise UntraceableError("its forward asks whether a value is None")

        def write(module: nn.Module, name: str, value: Any = None) -> None:
            is_made = sys._getframe(1).f_code.co_name == "__init__"
            if name.startswith("_tensor_constant"):  # torch.fx writes it
                raise UntraceableError("its forward uses a tensor that is neither its input nor a module's attribute")
            if not is_made or type(module) is not nn.ReLU:
                does = f"makes a {type(module).__name__}" if is_made else f"writes attributes of modules ({name})"
                raise UntraceableError(f"its forward {does}")
            vars(module)[name] = value
            watch.made.add(module)

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
        if not is_plain(value) and not isinstance(value, CALLABLE):
            raise UntraceableError(f"its forward reads {name}, which may change unseen ({type(value).__name__})")
        if not isinstance(value, MethodType):  # a method is a new object at each read
            self.settings[id(owner), name] = Setting(owner, name, value)

    def screen(self, frame: FrameType) -> tuple[str, ...]:
        """Raise UntraceableError if a function's code does something that a graph would not show.

        Returns:
            The arguments that the function compares with None; always empty unless `frozen`.
        """
        code, namespace = frame.f_code, frame.f_globals
        if is_library(frame):
            return ()
        instructions = list(dis.get_instructions(code))
        opcodes = [instruction.opname for instruction in instructions]
        # Only stand-ins make a function fail. Without arguments and free variables only generators have any.
        is_given = code.co_argcount + code.co_kwonlyargcount + len(code.co_freevars) > 0 or code.co_flags & MAY_BE_GIVEN
        if opcodes.count("PUSH_EXC_INFO") > opcodes.count("WITH_EXCEPT_START") and (is_given or not self.frozen):
            raise UntraceableError("its forward has a try statement")
        if "STORE_GLOBAL" in opcodes or "DELETE_GLOBAL" in opcodes:
            raise UntraceableError("its forward writes global variables")
        stored = {name for one in instructions if one.opname.startswith("STORE_") for name in _variables(one)}
        arguments = {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
        asked = _compared(instructions)
        if asked and not (self.frozen and asked <= arguments - stored - {*code.co_cellvars}):
            raise UntraceableError("its forward asks whether a value is None or a certain object")
        loaded = {instruction.argval for instruction in instructions if instruction.opname == "LOAD_GLOBAL"}
        for name in code.co_names:
            is_meant = name in loaded or name not in vars(builtins)  # not x.type(dtype)
            if name in QUESTIONS and is_meant and not (self.frozen and name in FROZEN):
                raise UntraceableError(f"its forward {QUESTIONS[name]} ({name})")
        for name in code.co_freevars:
            value = frame.f_locals.get(name)
            if name in ("__class__", "__classdict__"):  # Python 3.14's functions of annotations read the latter
                continue
            if type(value) not in STAND_INS and not isinstance(value, CALLABLE):
                raise UntraceableError(f"its forward reads {name}, a variable of the function around it")
        if not self.frozen:
            for name in loaded:
                if name in namespace or not hasattr(builtins, name):
                    self.note(namespace, name, namespace.get(name))
        return tuple(asked)

    def may_be_none(self, value: Any) -> bool:
        """Return whether a stand-in may stand for None, as the output of an opaque module may."""
        if type(value) not in STAND_INS:
            return False
        node = value.node
        if node.op == "call_module":
            return type(value.tracer.root.get_submodule(node.target)) not in GIVE_TENSORS
        name = getattr(node.target, "__name__", "")
        if node.op == "placeholder":
            return True
        return name == "getitem" or all(getattr(space, name, None) is not node.target for space in (torch, F, operator))


def is_library(frame: FrameType) -> bool:
    """Return whether a frame runs code of a library, which was not written for this forward."""
    library, _, _ = frame.f_globals.get("__name__", "").partition(".")
    return library in LIBRARIES or library.startswith("namedtuple_")  # the latter is collections.namedtuple's code


def _compared(instructions: list[dis.Instruction]) -> set[Any]:
    """Return the local variables that are compared with None, and "" if other objects are compared."""
    compared = set()
    for i, instruction in enumerate(instructions):
        is_identity = instruction.opname == "IS_OP"
        if is_identity or instruction.opname.endswith(("_IF_NONE", "_IF_NOT_NONE")):
            before = [one.opname for one in instructions[max(i - 3, 0) : i]]
            if before == ["LOAD_GLOBAL", "COPY", "LOAD_COMMON_CONSTANT"]:
                continue  # since 3.14 Python asks in `any(... for ...)` whether any is the builtin function
            n_instructions = 2 if is_identity and len(_variables(instructions[i - 1])) == 1 else 1
            operands = instructions[max(i - n_instructions, 0) : i]
            names = {_variables(one)[-1] for one in operands if "LOAD_FAST" in one.opname or one.opname == "LOAD_DEREF"}
            is_none = any(one.opname == "LOAD_CONST" and one.argval is None for one in operands) or not is_identity
            compared |= names if is_none or not names else {""}
    return compared


def _variables(instruction: dis.Instruction) -> tuple[str, ...]:
    """Return the variables that an instruction loads or stores: one or, since Python 3.13, two."""
    return instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)


def is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple) and all(map(is_plain, value)))


@contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Undo changes of a forward to attributes and random states.

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
    """Return each attribute, with a copy of those dicts that hold parameters, buffers, modules and hooks."""
    return {
        name: (value, value.copy() if name in OWN and isinstance(value, dict) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> bool:
    """Restore all attributes, and return whether any had changed."""
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
