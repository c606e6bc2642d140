"""Replace each site in the graph of a forward with one fused operation."""

import operator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn import FusedBatchNorm2d
from .sites import FRESH, Site

# Modules that do not change their input.
READERS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.Identity, nn.BatchNorm2d, FusedBatchNorm2d)


def fused_steps(
    norm: Any,
    x: Tensor,
    residual: Tensor | None,
    residual_norm: Any,
    *,
    relu: bool,
    in_place: str = "",
    fork: bool = False,
) -> Any:
    """Compute relu(norm(x) + residual_norm(residual)), as one operation if everything fits, else step by step.

    This checks what a graph cannot know. A residual of another shape or type is added as in eager PyTorch, and a module
    that has replaced the fused norm is called.

    Args:
        norm, residual_norm: modules; residual_norm is None if the residual is added unchanged.
        x: [N, C, H, W].
        residual: a tensor of any shape, or None.
        relu: whether to end in ReLU.
        in_place: as `Site.in_place`.
        fork: whether to return y twice, for two consumers.

    Returns:
        y: [N, C, H, W], or (y, y) with `fork`.
    """
    if isinstance(x, fx.Proxy):  # one step to torch.fx, too, which retraces a GraphModule to unpickle it
        arguments = (norm, x, residual, residual_norm)
        settings = {"relu": relu, "in_place": in_place, "fork": fork}
        return x.tracer.create_proxy("call_function", fused_steps, arguments, settings)
    if _fits(norm, x, residual, residual_norm):
        return norm.fused(x, residual, residual_norm, relu=relu, fork=fork)
    y = norm(x)
    if residual is not None:
        y = add(y, residual if residual_norm is None else residual_norm(residual), in_place)
    y = F.relu(y) if relu else y
    return (y, y) if fork else y


def add(y: Tensor, residual: Tensor, in_place: str) -> Tensor:
    """Return y + residual, in place in y for "norm" or in the residual for "residual"."""
    if in_place == "norm":
        return y.add_(residual)
    return residual.add_(y) if in_place == "residual" else y + residual


def _fits(norm: Any, x: Tensor, residual: Tensor | None, residual_norm: Any) -> bool:
    if not isinstance(norm, FusedBatchNorm2d) or norm.relu:
        return False
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        return False
    return residual_norm is None or (
        isinstance(residual_norm, FusedBatchNorm2d)
        and not residual_norm.relu
        and residual_norm.group() is norm.group()
        and residual_norm.ghost_batch_size == norm.ghost_batch_size
    )


def fuse(graph: fx.Graph, root: nn.Module, sites: list[Site]) -> None:
    """Replace each site with one call of `fused_steps`; if it has two consumers, each gets a handle of its own."""
    fused = [_replace(graph, site) for site in sites]
    modules = dict(root.named_modules(remove_duplicate=False))
    for node in fused:
        readers = list(node.users)
        if len(readers) == 2 and all(_only_reads(reader, node, modules) for reader in readers):
            _fork(graph, node, readers)
    graph.lint()


def _replace(graph: fx.Graph, site: Site) -> fx.Node:
    # At the addition, because its residual must exist by then; without an addition, at the norm.
    with graph.inserting_before(site.add or site.norm):
        norm, *residual_norm = [graph.get_attr(str(call.target)) for call in site.norms]
        arguments = (norm, site.norm.args[0], site.residual, residual_norm[0] if residual_norm else None)
        settings = {"relu": site.relu is not None, "in_place": site.in_place}
        node = graph.call_function(fused_steps, arguments, settings)
    put_in_place(graph, site, node)
    return node


def put_in_place(graph: fx.Graph, site: Site, node: fx.Node) -> None:
    """Let `node` replace a site's output, and erase the site's steps."""
    site.last.replace_all_uses_with(node)
    gone = {*site.norms, *site.between, site.add, site.relu}
    for step in [step for step in reversed(graph.nodes) if step in gone]:
        graph.erase_node(step)


def changes_nothing(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a step is known not to change any existing tensor."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) in READERS or (type(module) is nn.ReLU and not module.inplace)
    return node.op == "get_attr" or (node.op == "call_function" and node.target in FRESH)


def _only_reads(reader: fx.Node, value: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a node reads a value once and does not change it."""
    if sum(argument is value for argument in reader.args) != 1:
        return False
    if reader.op == "call_module":
        # nn.Identity would pass it on to others.
        return type(modules[str(reader.target)]) is not nn.Identity and changes_nothing(reader, modules)
    return reader.target is fused_steps and value in reader.args[1:3]


def _fork(graph: fx.Graph, node: fx.Node, readers: list[fx.Node]) -> None:
    node.update_kwarg("fork", True)
    with graph.inserting_after(node):
        handles = [graph.call_function(operator.getitem, (node, index)) for index in (0, 1)]
    for reader, handle in zip(readers, handles, strict=True):
        reader.replace_input_with(node, handle)
