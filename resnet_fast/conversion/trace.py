"""Trace a module's forward into a graph of torch.fx, or give the reason why the graph would not be reliable.

torch.fx runs the forward once, on stand-ins for its inputs, and records the operations on them. It misses everything
else that the forward does or depends on. So the forward is watched, and a graph is returned only if the forward

- does the same with and without gradients and autocast, and switches neither these nor checkpointing on or off;
- does not read the mode, and does not ask how it is run, for types, or for attributes that tensors do not have;
- catches no exceptions, prints nothing, and neither draws random numbers in Python nor writes attributes or globals;
- makes no modules, except an nn.ReLU, which holds nothing;
- reads only attributes, globals and outer variables that cannot change unseen: functions, classes, modules, and plain
  values, which are compared again before each use of the graph.

Reed et al. 2022, torch.fx, arXiv:2112.08429.
"""

import builtins
import dis
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from ..common.checks import one_line
from .stand_ins import STAND_INS, Input, UntraceableError, Value
from .watch import Setting, Watch, is_library, is_plain, left_as_it_was

DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
# Packages whose modules are leaves, called unchanged. Ours are fused already.
FOREIGN = ("torch.nn.", "torch.jit.", "torch.distributed.")
LEAVES = (*FOREIGN, "resnet_fast.")
# Errors that a check can raise again, from a name and a message.
RAISED = ("ValueError", "TypeError", "RuntimeError", "AssertionError", "NotImplementedError", "IndexError")
MOST_QUESTIONS = 6  # per forward: each may double the number of traces


class Traced(NamedTuple):
    """The graph of a forward, and the settings that it depends on."""

    graph: fx.Graph
    settings: tuple[Setting, ...]


class _UnansweredError(Exception):
    """The forward asks whether a value is true, and no answer was given."""


@fx.has_side_effect
def check_that(value: Any, answer: bool, kind: str, message: str) -> None:
    """Raise the forward's own error unless bool(value) is `answer`."""
    if isinstance(value, fx.Proxy):  # torch.fx retraces a GraphModule to unpickle it
        value.tracer.create_proxy("call_function", check_that, (value, answer, kind, message), {})
    elif bool(value) is not answer:
        raise getattr(builtins, kind)(message)


class _Tracer(fx.Tracer):
    """torch.fx's tracer; modules without children, those of torch.nn and opaque ones are single steps."""

    proxy_buffer_attributes = True

    # With defaults, because torch.fx makes one without arguments when it unpickles a GraphModule.
    def __init__(
        self,
        opaque: Collection[nn.Module] = (),
        leaves: tuple[str, ...] = LEAVES,
        made: Collection[nn.Module] = (),
        answers: tuple[bool, ...] | None = None,
    ) -> None:
        super().__init__()
        self.opaque, self.leaves, self.made = opaque, leaves, made
        self.answers, self.checks, self.makes_text = answers, [], False
        self.context = _context()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_container(m, self.leaves) or m in self.opaque

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        if m in self.made:
            return m.forward(*args, **kwargs)
        # Not `forward`, which runs the module's hooks; they must not see stand-ins.
        return super().call_module(m, m.forward, args, kwargs)

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:
            raise UntraceableError(f"its forward calls a {type(mod).__name__} that it does not hold") from None

    def create_arg(self, a: Any) -> Any:
        if type(a) in STAND_INS:  # torch.fx would ask for types
            return a.node
        if isinstance(a, dict | list) and type(a) not in (dict, list, immutable_dict, immutable_list):
            raise UntraceableError(f"its forward makes a {type(a).__name__}, which torch.fx turns into a plain one")
        return super().create_arg(a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Make the parameters without a default the inputs; the others keep their defaults, also in the graph."""
        names = _required_parameters(root_fn)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.context:
            raise UntraceableError("its forward switches gradients, autocast or checkpointing on or off")
        return super().create_node(kind, *args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if self.answers is None:
            return super().to_bool(obj)
        if len(self.checks) == len(self.answers):
            raise _UnansweredError
        answer = self.answers[len(self.checks)]
        self.checks.append(self.create_node("call_function", check_that, (obj.node, answer), {}))
        return answer

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Input(node, self) if node.op == "placeholder" else Value(node, self)


def is_container(module: nn.Module, leaves: tuple[str, ...] = LEAVES) -> bool:
    """Return whether to trace into the forward of a module, judging by the module itself."""
    if type(module) is nn.Sequential:  # an empty one, too: a shortcut that returns its input
        return True
    return bool(module._modules) and not type(module).__module__.startswith(leaves)


def trace(
    module: nn.Module,
    opaque: Collection[nn.Module],
    *,
    frozen: bool = False,
    leaves: tuple[str, ...] = LEAVES,
) -> Traced:
    """Return the graph of a module's forward; the modules inside become `call_module` nodes or are traced, too.

    Args:
        module: a container; it is not changed.
        opaque: modules inside that are called as a whole.
        frozen: whether to assume evaluation mode and the present settings. A branch that only raises an error then
            becomes a step that checks its condition.
        leaves: prefixes of the packages whose modules are called unchanged.

    Raises:
        UntraceableError: the graph might not do what the forward does.
    """
    if "forward" in module.__dict__:
        raise UntraceableError("its forward is patched")
    if isinstance(module, fx.GraphModule) and not frozen:  # it makes a class of its own for each copy
        raise UntraceableError("it is a GraphModule; convert the model that it was made from")
    traces = []
    for with_gradients in (True, False):
        with left_as_it_was(module), torch.set_grad_enabled(with_gradients), _autocast(not with_gradients):
            watch = Watch(frozen)
            try:
                with watch.watching():
                    followed = _follow(module, partial(_Tracer, opaque, leaves, watch.made), () if frozen else None)
                if isinstance(followed, Exception):
                    raise followed
            except UntraceableError:
                raise
            except Exception as error:  # a forward is arbitrary code, which may fail on stand-ins in any way
                raise UntraceableError(f"torch.fx cannot follow its forward ({one_line(error, 80)})") from error
            traces.append(Traced(followed[0], tuple(watch.settings.values())))
    if str(traces[0].graph) != str(traces[1].graph):
        raise UntraceableError("its forward does not do the same with gradients as without, or twice")
    return traces[0]


def _follow(
    module: nn.Module, tracer: Callable[..., _Tracer], answers: tuple[bool, ...] | None
) -> tuple[fx.Graph, list[fx.Node]] | Exception:
    """Trace a forward whose first questions get these answers; return the graph and the steps that check all answers.

    Later questions get the answer that does not end in an error. If both answers do, return the error.
    """
    tracing = tracer(answers)
    try:
        graph = tracing.trace(module)
    except _UnansweredError:
        assert answers is not None
    except Exception as error:
        if answers and _is_own(error):
            return error
        raise
    else:
        if tracing.makes_text:
            raise UntraceableError("its forward formats a value as text")
        return graph, tracing.checks
    both = [_follow(module, tracer, (*answers, answer)) for answer in (True, False) if len(answers) < MOST_QUESTIONS]
    errors = [followed for followed in both if isinstance(followed, Exception)]
    graphs = [followed for followed in both if not isinstance(followed, Exception)]
    if len(errors) == 2:
        return errors[0]
    if len(errors) == 0:
        raise UntraceableError("torch.fx cannot follow its forward (values or shapes decide what it computes)")
    check = graphs[0][1][len(answers)]
    kind = type(errors[0]).__name__
    if kind not in RAISED:
        raise UntraceableError(f"its forward raises a {kind}")
    check.args = (*check.args, kind, str(errors[0]))
    return graphs[0]


def _is_own(error: Exception) -> bool:
    """Return whether a raise statement of the forward itself raised the error."""
    step: Any = error.__traceback__
    while step.tb_next:
        step = step.tb_next
    return not is_library(step.tb_frame) and step.tb_frame.f_code.co_code[step.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _required_parameters(function: Any) -> list[str]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    names = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UntraceableError(f"its forward accepts any arguments (*{parameter.name})")
        if parameter.default is not parameter.empty and not is_plain(parameter.default):
            raise UntraceableError(f"its forward has a default for {parameter.name} that may change")
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise UntraceableError(f"its forward needs the keyword {parameter.name}")
            names.append(parameter.name)
    return names


def _context() -> tuple[Any, ...]:
    """Return the switches that affect operations but are not in a graph."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device_type) for device_type in DEVICE_TYPES),
        *(torch.get_autocast_dtype(device_type) for device_type in DEVICE_TYPES),
        torch._C._autograd._top_saved_tensors_default_hooks(True),  # type: ignore[attr-defined]
    )


@contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    """Set only the autocast switches, because torch.autocast would look for the device."""
    before = [torch.is_autocast_enabled(device_type) for device_type in DEVICE_TYPES]
    try:
        for device_type in DEVICE_TYPES:
            torch.set_autocast_enabled(device_type, enabled)
        yield
    finally:
        for device_type, was_enabled in zip(DEVICE_TYPES, before, strict=True):
            torch.set_autocast_enabled(device_type, was_enabled)
