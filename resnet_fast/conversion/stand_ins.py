"""Stand-ins for tensors while torch.fx traces a forward; they refuse questions whose answers no graph can hold."""

import dis
import operator
import sys
from collections.abc import Callable
from functools import partialmethod
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, fx
from torch.fx.proxy import Attribute

# Modules that may read the type of a stand-in: torch.fx itself, and code that sets a module's attribute, which `Watch`
# notices.
TRUSTED = ("torch.fx", "torch.utils._pytree", "torch.overrides", "torch.nn.modules.module", "torch.nn.parameter")
# The attributes of a tensor, besides its methods, that a graph can hold. None of them is ever None.
ATTRIBUTES = ("shape", "dtype", "device", "layout", "ndim", "data", "T", "mT", "H", "mH", "requires_grad")


class UntraceableError(Exception):
    """The graph of a forward would not do what the forward does; the message says why."""


class _Proxy(fx.Proxy):
    """torch.fx's stand-in, which by itself would record `x += y` as `x + y` and accept any attribute."""

    def in_place(self, function: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __getattr__(self, k: str) -> Any:
        if not callable(getattr(Tensor, k, None)) and k not in ATTRIBUTES:
            raise UntraceableError(f"its forward reads a value's {k!r}, which no graph can hold")
        frame = sys._getframe(1)
        is_read = dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("LOAD_")
        if "hasattr" in frame.f_code.co_names and not is_read:
            raise UntraceableError(f"its forward asks a value whether it has {k!r}")
        return _Attribute(self, k)  # type: ignore[call-arg, arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        if not _is_trusted(sys._getframe(1)):
            raise UntraceableError(f"its forward sets {name} of a value")
        super().__setattr__(name, value)

    def __hash__(self) -> int:
        if not _is_trusted(sys._getframe(1)):
            raise UntraceableError("its forward looks for a value in a set or dict")
        return id(self)

    def __repr__(self, form: str = "") -> str:
        if not _is_trusted(sys._getframe(1)):
            vars(self.tracer)["makes_text"] = True  # useful only in an error's message
        return "?"

    __str__ = __format__ = __repr__


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", partialmethod(_Proxy.in_place, getattr(operator, _name)))


class Value(_Proxy):
    """A value that the forward computes, which may not be a tensor."""

    @property
    def __class__(self) -> type:  # isinstance reads it, after type()
        frame = sys._getframe(1)
        if not _is_trusted(frame) and _asks_for_types(frame.f_code):
            raise UntraceableError("its forward asks for the type of an intermediate value")
        return Value


class _Attribute(Value, Attribute):
    """An attribute of a stand-in, or a method that is about to be called."""


class Input(_Proxy):
    """An input of the forward: a tensor, which is checked again at each use of the graph."""

    @property
    def __class__(self) -> type:
        # torch's own functions must not see a Tensor, because some would pass it on to C.
        return Input if sys._getframe(1).f_globals.get("__name__", "").startswith("torch.") else Tensor


STAND_INS = (Value, _Attribute, Input)


def _is_trusted(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith((*TRUSTED, __name__))


def _asks_for_types(code: CodeType) -> bool:
    """Return whether the function itself may have asked, instead of a function of torch written in C."""
    return "isinstance" in code.co_names or any(i.opname == "MATCH_CLASS" for i in dis.get_instructions(code))
