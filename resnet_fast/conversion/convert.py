"""Turn any model's batch norms into fused modules, in place, and back.

Only classes change. Each nn.BatchNorm2d becomes a FusedBatchNorm2d. A module whose forward runs an addition or a ReLU
after a batch norm gets a class of the same name with a fused forward. So parameters, buffers, keys, hooks and modes
stay unchanged. The original forward still runs, step by step, whenever the fused one might differ: with hooks inside,
under torch.fx, with other modules or settings than at conversion, or with arguments that are not tensors.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..common.checks import check_type
from ..models.blocks import has_own_hook, is_observed
from ..nn import FusedBatchNorm2d, FusedSyncBatchNorm2d
from .report import Outcome, Report
from .rewrite import fuse
from .sites import Site, find_sites
from .trace import LEAVES, Setting, Traced, UntraceableError, is_container, trace


@dataclass(frozen=True, eq=False)
class _Fused:
    """The fused forward of one module, and the structure that it was made from.

    Args:
        forward: a function of the module and its inputs.
        n_inputs: number of input tensors.
        within: all modules inside the module.
        children: for the module and each container in it, its direct children.
        weights: for each container, the names of its own parameters and buffers that are not None.
        settings: everything else that the forward has read.
    """

    forward: Callable[..., Any]
    n_inputs: int
    within: tuple[nn.Module, ...]
    children: tuple[tuple[nn.Module, tuple[nn.Module | None, ...]], ...]
    weights: tuple[tuple[nn.Module, tuple[str, ...]], ...]
    settings: tuple[Setting, ...]

    def holds(self, inputs: tuple[Any, ...]) -> bool:
        """Return whether the fused forward computes what the module's own would; this runs at every step."""
        if len(inputs) != self.n_inputs or any(isinstance(x, fx.Proxy) or not isinstance(x, Tensor) for x in inputs):
            return False
        if nn.modules.module._has_any_global_hook() or any(map(has_own_hook, self.within)):
            return False
        if any(tuple(owner._modules.values()) != children for owner, children in self.children):
            return False
        if any(_own_weights(owner) != names for owner, names in self.weights):
            return False
        return all(setting.holds() for setting in self.settings)


def _own_weights(module: nn.Module) -> tuple[str, ...]:
    own = (*module._parameters.items(), *module._buffers.items())
    return tuple(name for name, value in own if value is not None)


class Converted(nn.Module):
    """Base of the classes of converted modules, before the module's own class."""

    plain_class: type[nn.Module]
    _opaque: tuple[nn.Module, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Skip the plain class's hook, which may register subclasses or require arguments."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle finds classes by name, and by this name it finds the plain class. The forward is rebuilt on loading.
        state: Any = self.__getstate__()
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != "_fused"}
        return _new_converted, (self.plain_class,), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _make_forward_again(self)


def _new_converted(plain_class: type[nn.Module]) -> nn.Module:
    converted_class = _converted_class(plain_class)
    return converted_class.__new__(converted_class)


_CLASSES: dict[type[nn.Module], type[Converted]] = {}


def _converted_class(plain_class: type[nn.Module]) -> Any:
    if plain_class not in _CLASSES:

        @functools.wraps(plain_class.forward)  # shows the plain signature, which torch.fx reads
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            fused = self.__dict__.get("_fused")
            if fused is None or kwargs or not fused.holds(args):
                return plain_class.forward(self, *args, **kwargs)
            return fused.forward(self, *args)

        names = ("__module__", "__qualname__", "__doc__")
        body = {name: getattr(plain_class, name) for name in names}
        body |= {"plain_class": plain_class, "forward": forward}
        _CLASSES[plain_class] = type(plain_class.__name__, (Converted, plain_class), body)
    return _CLASSES[plain_class]


def _fused_forward(module: nn.Module, traced: Traced, sites: list[Site]) -> _Fused:
    fuse(traced.graph, module, [site for site in sites if site.is_joint])
    return _Fused(
        forward=type(fx.GraphModule(module, traced.graph)).forward,
        n_inputs=sum(node.op == "placeholder" for node in traced.graph.nodes),
        within=tuple(inner for inner in module.modules() if inner is not module),
        children=tuple(
            (inner, tuple(inner._modules.values()))
            for inner in module.modules()
            if inner._modules or is_container(inner)
        ),
        weights=tuple(
            (inner, _own_weights(inner))
            for inner in module.modules()
            if is_container(inner) and (inner._parameters or inner._buffers)
        ),
        settings=traced.settings,
    )


def _set_class(module: Any, new_class: type[nn.Module]) -> None:
    module.__class__ = new_class


def make_fused(norm: nn.Module) -> None:
    """Turn an nn.BatchNorm2d into a FusedBatchNorm2d that `restore` can turn back; other norms stay unchanged."""
    if type(norm) is nn.BatchNorm2d:
        _set_class(norm, FusedBatchNorm2d)
        vars(norm).update(relu=False, _was_plain=True)


def _make_forward_again(module: Converted) -> None:
    """Build the fused forward of a copy, whose modules are new; if it cannot be traced now, its own forward runs."""
    norms = {inner for inner in module.modules() if "_was_plain" in vars(inner)}
    converted_class = type(module)
    _set_class(module, module.plain_class)
    try:
        traced = trace(module, module._opaque)
    except UntraceableError:
        return
    finally:
        _set_class(module, converted_class)
    module.__dict__["_fused"] = _fused_forward(module, traced, find_sites(traced.graph, module, norms))


@overload
def convert(model: nn.Module, *, report: Literal[False] = False) -> nn.Module: ...
@overload
def convert(model: nn.Module, *, report: Literal[True]) -> tuple[nn.Module, Report]: ...
def convert(model: nn.Module, *, report: bool = False) -> Any:
    """Fuse the batch norms of any model with the additions and ReLUs that follow them, in place.

    The model may be torchvision's, timm's or your own. A batch norm is fused with its followers only if the structure
    of the model, traced by torch.fx, proves that nothing else depends on the steps in between. Otherwise it becomes a
    fused module alone, or is left. Parameters, buffers, keys, hooks, modes and results stay unchanged. `restore` undoes
    it. Apply `torch.compile` and DistributedDataParallel afterwards. The memory format also stays; channels_last is the
    fast one.

    Numerics: as `batch_norm_add_relu`, which rounds once; eager PyTorch rounds after each step.

    Args:
        model: any module, also a single batch norm.
        report: whether to return a report on each batch norm, too.

    Returns:
        `model`, or (`model`, Report) with `report`.

    Raises:
        TypeError: model is not an nn.Module, or report is not a bool.
        ValueError: model is or contains a module compiled by torch.compile or TorchScript. The model is unchanged.
    """
    check_is_module(model)
    check_type("report", report, bool)
    check_is_not_compiled(model)
    restore(model)  # the model may have changed since an earlier conversion
    traced, opaque = trace_all(model)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    most_calls = _most_calls(traced)
    left = {norm: reason for norm in norms if (reason := _reason_to_leave(norm, most_calls[norm]))}
    to_convert = {norm for norm in norms if norm not in left}
    sites = {module: find_sites(forward.graph, module, to_convert) for module, forward in traced.items()}
    outcomes = _outcomes(model, left, sites, opaque)
    joint = {
        module: module_sites for module, module_sites in sites.items() if any(site.is_joint for site in module_sites)
    }
    classes = {module: _converted_class(type(module)) for module in joint}
    fused = {module: _fused_forward(module, traced[module], module_sites) for module, module_sites in joint.items()}

    for norm in to_convert:
        make_fused(norm)
    for module in joint:
        _set_class(module, classes[module])
        inner_opaque = tuple(inner for inner in module.modules() if inner in opaque)
        vars(module).update(_fused=fused[module], _opaque=inner_opaque)
    return (model, Report(outcomes, _notes(model))) if report else model


def restore(model: nn.Module) -> nn.Module:
    """Undo `convert`, in place; weights, statistics and hooks keep their present values.

    Returns:
        `model`. A norm that `convert_sync_batchnorm` has synchronized since becomes an nn.SyncBatchNorm.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: the class of a converted module has changed since, as by a parametrization. Nothing is restored.
    """
    check_is_module(model)
    for name, module in model.named_modules():
        if not _is_as_made(module):
            got = type(module).__name__
            rule = "must have the class that convert gave it"
            raise ValueError(f"{name or 'model'} {rule}, got a {got}: undo that change first")
    for module in list(model.modules()):
        attributes = vars(module)
        if isinstance(module, Converted):
            _set_class(module, module.plain_class)
            for name in ("_fused", "_opaque"):
                attributes.pop(name, None)
        elif "_was_plain" in attributes:
            _set_class(module, nn.SyncBatchNorm if type(module) is FusedSyncBatchNorm2d else nn.BatchNorm2d)
            for name in ("_was_plain", "relu"):
                del attributes[name]
    return model


def _is_as_made(module: nn.Module) -> bool:
    if isinstance(module, Converted):
        return type(module) is _CLASSES[module.plain_class]
    return "_was_plain" not in vars(module) or type(module) in (FusedBatchNorm2d, FusedSyncBatchNorm2d)


def check_is_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def check_is_not_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = name or "model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} must not be compiled by TorchScript, got {type(module).__name__}")
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"{where} must be converted before torch.compile, got a compiled module")


def trace_all(
    model: nn.Module, *, frozen: bool = False, leaves: tuple[str, ...] = LEAVES
) -> tuple[dict[nn.Module, Traced], dict[nn.Module, str]]:
    """Return the graph of every module that can be traced and the reason for every other one, from the inside out."""
    traced, opaque = {}, {}
    for module in reversed(list(model.modules())):
        if is_container(module, leaves):
            # Some forwards can be followed only with their caller's arguments, such as a list of tensors.
            look_inside = frozen and any(inner in opaque for inner in module.modules())
            for called_whole in ({}, opaque) if look_inside else (opaque,):
                try:
                    traced[module] = trace(module, called_whole, frozen=frozen, leaves=leaves)
                    break
                except UntraceableError as error:
                    reason = str(error)
            else:
                opaque[module] = reason
    return traced, opaque


def _most_calls(traced: dict[nn.Module, Traced]) -> Counter[nn.Module]:
    """Return for each module the largest number of its calls in one forward."""
    most: Counter[nn.Module] = Counter()
    for module, forward in traced.items():
        calls = [str(node.target) for node in forward.graph.nodes if node.op == "call_module"]
        most |= Counter(map(module.get_submodule, calls))
    return most


def _reason_to_leave(norm: nn.Module, n_calls: int) -> str:
    """Return why a batch norm cannot be fused, or "" if it can."""
    if isinstance(norm, FusedBatchNorm2d):
        return "is fused already"
    if type(norm) is nn.SyncBatchNorm:
        return "is synchronized: convert first, then resnet_fast.convert_sync_batchnorm"
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm3d):
        return f"is an nn.{type(norm).__name__}, which is not for images"
    if type(norm) is not nn.BatchNorm2d:
        return f"is a {type(norm).__name__}, whose forward may differ"
    if "forward" in vars(norm):
        return "has a patched forward"
    return f"is called {n_calls} times in one forward" if n_calls > 1 else ""


def _outcomes(
    model: nn.Module,
    left: Mapping[Any, str],
    sites: dict[nn.Module, list[Site]],
    opaque: dict[nn.Module, str],
) -> tuple[Outcome, ...]:
    """Return the outcome for each batch norm; of the sites that contain it, the one with the most steps counts."""
    best: dict[nn.Module, tuple[Site, nn.Module]] = {}
    for module, module_sites in sites.items():
        modules = dict(module.named_modules(remove_duplicate=False))
        for site in module_sites:
            for call in site.norms:
                norm = modules[str(call.target)]
                if norm not in best or len(site.operation) >= len(best[norm][0].operation):  # the outer sees more
                    best[norm] = site, module
    names = {module: name for name, module in model.named_modules()}
    outcomes = []
    for name, norm in model.named_modules():
        if norm in left:
            outcomes.append(Outcome(name, "left", "", left[norm]))
        elif norm in best:
            site, module = best[norm]
            why = site.why or ("" if site.is_joint else _why_it_ends(model, names[module], opaque))
            outcomes.append(Outcome(name, "converted", site.operation, why))
        elif isinstance(norm, _BatchNorm):
            why = why_opaque(model, name, opaque) or "no traced forward calls it with its input alone"
            outcomes.append(Outcome(name, "converted", "BN", why))
    return tuple(outcomes)


def why_opaque(model: nn.Module, name: str, opaque: Mapping[nn.Module, str]) -> str:
    """Return the innermost module around `name` that has no graph, with the reason; "" if all have one."""
    while name:
        name = name.rpartition(".")[0]
        if (around := model.get_submodule(name)) in opaque:
            return f"{name or 'model'}: {opaque[around]}"
    return ""


def _why_it_ends(model: nn.Module, name: str, opaque: Mapping[nn.Module, str]) -> str:
    """Return why nothing follows a batch norm at the end of the forward of `name`."""
    if reason := why_opaque(model, name, opaque):
        return f"what follows {name} is not known ({reason})"
    return f"{name} returns its output, and no traced forward calls it" if name else "model returns its output"


def _notes(model: nn.Module) -> tuple[str, ...]:
    notes = []
    # Not `m.weight`, which a parametrization would compute, sometimes with side effects.
    kernels = [m._parameters.get("weight") for m in model.modules() if isinstance(m, nn.Conv2d)]
    initialized = [weight for weight in kernels if weight is not None and not nn.parameter.is_lazy(weight)]
    if not all(weight.is_contiguous(memory_format=torch.channels_last) for weight in initialized):
        notes.append("channels_last is the fast layout: model.to(memory_format=torch.channels_last)")
    n_observed = sum(is_observed(module, torch.empty(0)) for module in model.modules() if isinstance(module, Converted))
    if n_observed:
        notes.append(f"{n_observed} modules run step by step as long as hooks or patched forwards are within them")
    return tuple(notes)
