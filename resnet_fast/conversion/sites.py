"""Find the batch norms in a graph of torch.fx, with the addition and the ReLU that follow them.

    relu(bn(x))                     BN+ReLU
    bn(x) + r                       BN+add
    relu(bn(x) + r)                 BN+add+ReLU
    relu(bn(x) + bn(r))             BN+BN+add+ReLU; without ReLU BN+BN+add

Steps form a site only if nothing else sees a value in between, and if running all of them at the place of the last one
changes nothing. So an addition in place may only change a value that nothing else sees. A batch norm before an addition
must read the output of a convolution that nothing else reads.
"""

import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..nn import FusedBatchNorm2d

ADDITIONS = (operator.add, operator.iadd, torch.add)
ADDITIONS_IN_PLACE = (operator.iadd, "add_")
FRESH = (operator.add, torch.add, operator.mul, torch.mul)
BATCH_NORMS = (nn.BatchNorm2d, FusedBatchNorm2d)
RELUS = (F.relu, torch.relu, torch.relu_)


@dataclass
class Site:
    """Nodes of one graph that can be one operation.

    Args:
        norm: the call of the batch norm.
        add: the addition.
        side: position of the output of `norm` in the addition, 0 or 1.
        residual_norm: the call of the residual's batch norm, which only the addition reads.
        relu: the ReLU at the end.
        between: calls of nn.Identity in between, which are erased with the rest.
        why: the reason if neither an addition nor a ReLU follows; "" if the forward ends with the norm.
    """

    norm: fx.Node
    add: fx.Node | None = None
    side: int = 0
    residual_norm: fx.Node | None = None
    relu: fx.Node | None = None
    between: list[fx.Node] = field(default_factory=list)
    why: str = ""

    @property
    def is_joint(self) -> bool:
        return self.last is not self.norm

    @property
    def residual(self) -> Any:
        """The residual, or the input of its norm. Read from the current graph, where it may be a fused site by now."""
        if self.residual_norm is not None:
            return self.residual_norm.args[0]
        return None if self.add is None else self.add.args[1 - self.side]

    @property
    def in_place(self) -> str:
        """The operand that the addition changes in place: the norm's output "norm", the other "residual", or ""."""
        if self.add is None or self.add.target not in ADDITIONS_IN_PLACE:
            return ""
        return ("norm", "residual")[self.side]

    @property
    def last(self) -> fx.Node:
        return self.relu or self.add or self.norm

    @property
    def norms(self) -> list[fx.Node]:
        return [self.norm] if self.residual_norm is None else [self.norm, self.residual_norm]

    @property
    def operation(self) -> str:
        names = ["BN"] * len(self.norms) + ["add"] * (self.add is not None) + ["ReLU"] * (self.relu is not None)
        return "+".join(names)


def find_sites(graph: fx.Graph, root: nn.Module, norms: Collection[nn.Module]) -> list[Site]:
    """Return the sites of a graph, in order; each call of one of `norms` is in exactly one of them."""
    modules = dict(root.named_modules(remove_duplicate=False))
    read = {modules[str(node.target).rpartition(".")[0]] for node in graph.nodes if node.op == "get_attr"}
    finder = _Finder(modules, norms, read)
    sites, taken = [], set()
    calls = [node for node in graph.nodes if finder.is_norm(node)]
    for node in calls:
        if node not in taken:
            site = finder.site(node)
            taken.update(site.norms)
            sites.append(site)
    return sites


@dataclass
class _Finder:
    modules: dict[str, nn.Module]
    norms: Collection[nn.Module]
    read: Collection[nn.Module]  # modules whose parameters or buffers another step reads

    def is_norm(self, node: object) -> bool:
        return (
            isinstance(node, fx.Node)
            and node.op == "call_module"
            and self.modules[str(node.target)] in self.norms
            and len(node.args) == 1
            and not node.kwargs
        )

    def site(self, norm: fx.Node) -> Site:
        user, between = self.only_reader(norm)
        if self.modules[str(norm.target)] in self.read:
            return Site(norm, why="another step reads its statistics or weights")
        if user is None:
            readers = [self.named(reader) for reader in (norm, *between)[-1].users]
            several = f"more than one step reads its output ({', '.join(readers)})"
            return Site(norm, why=several if readers else "no step reads its output")
        if user.op == "output":  # only the forward around this one shows what follows
            return Site(norm)
        if self.is_relu(user):
            return Site(norm, relu=user, between=between)
        if not self.is_addition(user):
            return Site(norm, why=f"{self.named(user)} reads its output")
        own = (norm, *between)[-1]
        others = [argument for argument in user.args if argument is not own]
        if len(others) != 1 or not isinstance(others[0], fx.Node):
            return Site(norm, why="an addition follows, but not of another tensor")
        if not self.reads_convolution(norm):
            return Site(norm, why="an addition follows, but its input is not from an nn.Conv2d that nothing else reads")
        (other,) = others
        residual_norm, residual_between = self.joined_norm(other)
        if user.target in ADDITIONS_IN_PLACE and user.args[0] is not own and not self.is_fresh(other):
            return Site(norm, why="it is added in place to a tensor that others may see")
        relu, relu_between = self.only_reader(user)
        if relu is None or not self.is_relu(relu):
            relu, relu_between = None, []
        side = user.args.index(own)
        return Site(norm, user, side, residual_norm, relu, [*between, *residual_between, *relu_between])

    def joined_norm(self, value: Any) -> tuple[fx.Node | None, list[fx.Node]]:
        """Return the batch norm whose output only the addition reads, or None, and the identities in between."""
        between = []
        while self.is_identity(value) and len(value.users) == 1:
            between.append(value)
            value = value.args[0]
        is_read = self.is_norm(value) and self.modules[str(value.target)] in self.read
        if self.is_norm(value) and not is_read and len(value.users) == 1 and self.reads_convolution(value):
            return value, between
        return None, []

    def only_reader(self, node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
        """Return the only node that reads a value, or None, and the nn.Identity calls in between."""
        between = []
        while len(node.users) == 1:
            (user,) = node.users
            if not self.is_identity(user):
                return user, between
            between.append(user)
            node = user
        return None, between

    def reads_convolution(self, norm: fx.Node) -> bool:
        source = norm.args[0]
        return (
            isinstance(source, fx.Node)
            and source.op == "call_module"
            and type(self.modules[str(source.target)]) is nn.Conv2d
            and len(source.users) == 1
        )

    def is_fresh(self, node: Any) -> bool:
        """Return whether a value is a new tensor with one reader, so that nothing else sees a change in place."""
        while self.is_identity(node) and len(node.users) == 1:
            node = node.args[0]
        if len(node.users) != 1:
            return False
        if node.op == "call_module":
            return type(self.modules[str(node.target)]) in (nn.Conv2d, *BATCH_NORMS)
        return node.op == "call_function" and node.target in FRESH

    def named(self, node: fx.Node) -> str:
        """Return the name of a step for the report."""
        if node.op == "call_module":
            return type(self.modules[str(node.target)]).__name__
        if node.op != "call_function":
            return "the caller" if node.op == "output" else f".{node.target}"
        if node.target is getattr:
            return f".{node.args[1]}"
        name = getattr(node.target, "__name__", str(node.target))
        space = next((space for space in (torch, F) if getattr(space, name, None) is node.target), None)
        extra = f" with {', '.join(node.kwargs)}" if node.target in ADDITIONS and node.kwargs else ""
        return f"{space.__name__ + '.' if space else ''}{name}{extra}"

    def is_identity(self, node: fx.Node) -> bool:
        return node.op == "call_module" and type(self.modules[str(node.target)]) is nn.Identity

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.modules[str(node.target)]) is nn.ReLU
        return (node.op == "call_function" and node.target in RELUS) or (
            node.op == "call_method" and node.target in ("relu", "relu_")
        )

    def is_addition(self, node: fx.Node) -> bool:
        is_one = (node.op == "call_function" and node.target in ADDITIONS) or (
            node.op == "call_method" and node.target in ("add", "add_")
        )
        return is_one and len(node.args) == 2 and not node.kwargs
