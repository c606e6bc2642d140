"""What a forward computes with while torch.fx traces it: stand-ins for tensors, which refuse questions that no graph
can hold the answers of.
"""

import dis
import operator
import sys
from collections.abc import Callable
from functools import partialmethod
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, fx
from torch.fx.proxy import Attribute

# Who may look at the type of a stand-in: torch.fx itself, and what sets a module's attribute, which is noticed.
TRUSTED = ("torch.fx", "torch.utils._pytree", "torch.overrides", "torch.nn.modules.module", "torch.nn.parameter")
# Of a tensor's attributes, besides its methods, what a graph can hold. None of them may be None.
ATTRIBUTES = ("shape", "dtype", "device", "layout", "ndim", "data", "T", "mT", "H", "mH", "requires_grad")


class UntraceableError(Exception):
    """The message says why the graph of a forward would not be what the forward does."""


class _Proxy(fx.Proxy):
    """torch.fx's stand-in, which would write `x += y` down as `x + y`, and have and take any attribute."""

    def in_place(self, function: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __getattr__(self, k: str) -> Any:
        if not callable(getattr(Tensor, k, None)) and k not in ATTRIBUTES:
            raise UntraceableError(f"its forward asks a value for {k!r}, which no graph can hold")
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
            vars(self.tracer)["makes_text"] = True  # of use for an error's message alone
        return "?"

    __str__ = __format__ = __repr__


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", partialmethod(_Proxy.in_place, getattr(operator, _name)))


class Value(_Proxy):
    """What the forward computes; whether it is a tensor is not known."""

    @property
    def __class__(self) -> type:  # what isinstance looks at, after type()
        frame = sys._getframe(1)
        if not _is_trusted(frame) and _asks_for_types(frame.f_code):
            raise UntraceableError("its forward asks for the type of an intermediate value")
        return Value


class _Attribute(Value, Attribute):
    """An attribute of a stand-in, or a method of it that is about to be called."""


class Input(_Proxy):
    """An input of the forward: a tensor, which is checked again whenever the graph is used."""

    @property
    def __class__(self) -> type:
        # Not to torch's own functions, some of which would hand it over to C as a tensor.
        return Input if sys._getframe(1).f_globals.get("__name__", "").startswith("torch.") else Tensor


STAND_INS = (Value, _Attribute, Input)


def _is_trusted(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith((*TRUSTED, __name__))


def _asks_for_types(code: CodeType) -> bool:
    """Whether a function may have asked itself, and not a function of torch that is written in C."""
    return "isinstance" in code.co_names or any(i.opname == "MATCH_CLASS" for i in dis.get_instructions(code))
