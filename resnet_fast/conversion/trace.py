"""What a module's forward does, as a graph of torch.fx, or the reason why that cannot be known for sure.

torch.fx runs the forward once, on stand-ins for its inputs, and writes down what happens to these. It misses whatever
else the forward does or depends on. So it is watched meanwhile, and a graph is given out only if the forward

- does the same with gradients and without, with autocast and without, and switches none of them, nor checkpointing;
- neither reads the mode nor asks how it is run, for types, or for attributes that tensors do not have;
- catches no exceptions, prints nothing, and neither draws random numbers in Python nor writes attributes or globals;
- makes no modules, except an nn.ReLU, which holds nothing;
- reads no attribute, global or outer variable that can change unseen: of plain values, which are compared again before
  the graph is used, functions, classes and modules alone.

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
# Whose modules are called as they are. Ours are fused already.
FOREIGN = ("torch.nn.", "torch.jit.", "torch.distributed.")
CLOSED = (*FOREIGN, "resnet_fast.")
# Errors that a check can raise again, from a name and a message.
RAISED = ("ValueError", "TypeError", "RuntimeError", "AssertionError", "NotImplementedError", "IndexError")
MOST_QUESTIONS = 6  # of one forward: each may double the times that it is traced


class Traced(NamedTuple):
    """The graph of a forward, and what else it depends on."""

    graph: fx.Graph
    settings: tuple[Setting, ...]


class _UnansweredError(Exception):
    """The forward asks whether a value is true, and no answer was given."""


@fx.has_side_effect
def check_that(value: Any, answer: bool, kind: str, message: str) -> None:
    """Raise the error that a forward raises unless the truth of `value` is `answer`."""
    if isinstance(value, fx.Proxy):  # torch.fx traces a GraphModule anew to unpickle it
        value.tracer.create_proxy("call_function", check_that, (value, answer, kind, message), {})
    elif bool(value) is not answer:
        raise getattr(builtins, kind)(message)


class _Tracer(fx.Tracer):
    """torch.fx's tracer, which calls modules without children, those of torch.nn, and the opaque ones, as they are."""

    proxy_buffer_attributes = True

    # Defaults: torch.fx makes one when it unpickles a GraphModule.
    def __init__(
        self,
        opaque: Collection[nn.Module] = (),
        closed: tuple[str, ...] = CLOSED,
        made: Collection[nn.Module] = (),
        answers: tuple[bool, ...] | None = None,
    ) -> None:
        super().__init__()
        self.opaque, self.closed, self.made = opaque, closed, made
        self.answers, self.checks, self.makes_text = answers, [], False
        self.context = _context()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_container(m, self.closed) or m in self.opaque

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        if m in self.made:
            return m.forward(*args, **kwargs)
        # Not `forward`, which runs the hooks of the module: these are not to see stand-ins.
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


def is_container(module: nn.Module, closed: tuple[str, ...] = CLOSED) -> bool:
    """Whether the forward of a module is to be looked into, as far as the module itself tells."""
    if type(module) is nn.Sequential:  # an empty one, too: it is a shortcut that gives its input itself
        return True
    return bool(module._modules) and not type(module).__module__.startswith(closed)


def trace(
    module: nn.Module,
    opaque: Collection[nn.Module],
    *,
    frozen: bool = False,
    closed: tuple[str, ...] = CLOSED,
) -> Traced:
    """Return the graph of a module's forward, with the modules within as `call_module` nodes or looked into.

    Args:
        module: a container; nothing in it is changed.
        opaque: modules within that are called as a whole.
        frozen: follow the forward in evaluation mode, with the present settings. A branch that only raises an error
            becomes a step that checks its condition.
        closed: beginnings of the names of Python modules whose classes are called as they are.

    Raises:
        UntraceableError: the graph would not say for sure what the forward does.
    """
    if "forward" in module.__dict__:
        raise UntraceableError("its forward is patched")
    if isinstance(module, fx.GraphModule) and not frozen:  # it makes its class itself, and again for each copy
        raise UntraceableError("it is a GraphModule; the model that it was made of can be converted")
    traces = []
    for with_gradients in (True, False):
        with left_as_it_was(module), torch.set_grad_enabled(with_gradients), _autocast(not with_gradients):
            watch = Watch(frozen)
            try:
                with watch.watching():
                    followed = _follow(module, partial(_Tracer, opaque, closed, watch.made), () if frozen else None)
                if isinstance(followed, Exception):
                    raise followed
            except UntraceableError:
                raise
            except Exception as error:  # the forward is anybody's code, and may fail on stand-ins in any way
                raise UntraceableError(f"torch.fx cannot follow its forward ({one_line(error, 80)})") from error
            traces.append(Traced(followed[0], tuple(watch.settings.values())))
    if str(traces[0].graph) != str(traces[1].graph):
        raise UntraceableError("its forward does not do the same with gradients as without, or twice")
    return traces[0]


def _follow(
    module: nn.Module, tracer: Callable[..., _Tracer], answers: tuple[bool, ...] | None
) -> tuple[fx.Graph, list[fx.Node]] | Exception:
    """Return the graph of a forward whose first questions get these answers, and the steps that check all answers.

    Later questions get the answer that does not end in an error. If every answer does, return the error.
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
            raise UntraceableError("its forward makes text of a value")
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
    """Whether a raise statement of the forward raised it."""
    step: Any = error.__traceback__
    while step.tb_next:
        step = step.tb_next
    return not is_library(step.tb_frame) and step.tb_frame.f_code.co_code[step.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _required_parameters(function: Any) -> list[str]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    names = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UntraceableError(f"its forward takes any arguments (*{parameter.name})")
        if parameter.default is not parameter.empty and not is_plain(parameter.default):
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
