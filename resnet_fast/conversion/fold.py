"""Batch norm folded into convolutions, for inference.

    bn(conv(x)) = conv'(x),   W' = W · s,   b' = (b - mean) · s + bias,   s = weight / sqrt(var + eps)

per output channel, with the running statistics (Jacob et al. 2018, arXiv:1712.05877, section 3.2).
"""

import copy
from collections import Counter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import functional
from ..nn import FusedBatchNorm2d
from .convert import check_is_module, make_fused, restore
from .rewrite import READERS, fuse, put_in_place
from .sites import Site, find_sites
from .trace import FOREIGN, UntraceableError, is_container, trace


class FoldedConv2d(nn.Conv2d):
    """A convolution with a bias that can add a residual and end in ReLU: relu(conv(x) + bias + residual).

    On the Triton backend the bias is added in the same pass as the residual and the ReLU, elsewhere by the convolution.

    Args:
        conv, norm: what is folded; neither is changed. Weights are computed in fp64 and rounded once.
        relu: whether to end in ReLU.
    """

    bias: nn.Parameter
    zeros: Tensor
    ones: Tensor

    def __init__(self, conv: nn.Conv2d, norm: Any, relu: bool) -> None:
        shape: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        super().__init__(conv.in_channels, conv.out_channels, *shape, padding_mode=conv.padding_mode, device="meta")
        self.relu = relu
        weight, bias = _folded(conv, norm)
        self.weight = nn.Parameter(weight, conv.weight.requires_grad)
        self.bias = nn.Parameter(bias, conv.weight.requires_grad)
        # As statistics of batch norm, which leave the values alone.
        self.register_buffer("zeros", torch.zeros_like(bias), persistent=False)
        self.register_buffer("ones", torch.ones_like(bias), persistent=False)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Both [N, C, H, W]; a residual of another shape or type is broadcast or promoted as eager does."""
        in_one_pass = functional.choose_backend(input) == "triton"
        y = self._conv_forward(input, self.weight, None if in_one_pass else self.bias)
        fits = residual is None or (residual.shape == y.shape and residual.dtype == y.dtype)
        if in_one_pass:
            joined = residual if fits else None
            relu = self.relu and fits
            y = functional.batch_norm_add_relu(
                y, self.zeros, self.ones, None, self.bias, eps=0.0, residual=joined, relu=relu
            )
            if fits:
                return y
        if residual is not None:
            y = y.add_(residual) if fits else y + residual  # a convolution's output is nobody else's
        return F.relu(y, inplace=True) if self.relu else y

    def extra_repr(self) -> str:
        return super().extra_repr() + (", relu=True" if self.relu else "")


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """W' and b', of the type and in the memory format of the convolution's weight."""
    n_channels, device = conv.out_channels, conv.weight.device
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None
    scale = (var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = torch.zeros(n_channels, dtype=torch.float64, device=device) if conv.bias is None else conv.bias.double()
    bias = (bias - mean.double()) * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = conv.weight.double() * scale[:, None, None, None]
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of a model for inference, each batch norm behind a convolution folded into its weights, and the
    addition and the ReLU that follow them run in the convolution's module.

    Every batch norm whose convolution, by torch.fx, nothing else reads is folded; the others are fused with what
    follows them. The copy is in evaluation mode and stays what it is there (dropout and the like are gone); its keys
    are others, and its statistics frozen.

    Numerics: weights are computed in fp64 and rounded once, to the type of the convolution's.

    Args:
        model: any model, ours, converted or plain, in any mode; it is left as it is.

    Returns:
        The copy: a torch.fx.GraphModule, or where torch.fx cannot follow the model's own forward, the model with such
        in the place of the modules that it can follow.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: nothing can be folded; the message says why.
    """
    check_is_module(model)
    copied = restore(copy.deepcopy(model)).eval()
    reasons: dict[str, str] = {}
    folded = _fold_within(copied, "model", _graphs(copied), reasons)
    if not any(isinstance(module, FoldedConv2d) for module in folded.modules()):
        seen = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"model has no batch norm that can be folded into a convolution{f' ({seen})' if seen else ''}")
    return folded


def _graphs(model: nn.Module) -> dict[nn.Module, fx.Graph | str]:
    """The graph of every container in evaluation mode, or why there is none; from the inside out."""
    graphs: dict[nn.Module, fx.Graph | str] = {}
    for module in reversed(list(model.modules())):
        if is_container(module, FOREIGN):
            opaque = [inner for inner, graph in graphs.items() if isinstance(graph, str)]
            try:
                graphs[module] = trace(module, opaque, modes=(False,), closed=FOREIGN)
            except UntraceableError as error:
                graphs[module] = str(error)
    return graphs


def _fold_within(
    module: nn.Module, name: str, graphs: dict[nn.Module, fx.Graph | str], reasons: dict[str, str]
) -> nn.Module:
    """Fold the outermost modules that have a graph; the others' own forwards stay."""
    graph = graphs.get(module)
    if isinstance(graph, fx.Graph):
        return _fold_graph(module, graph)
    if isinstance(graph, str):
        reasons[name] = graph
    for child_name, child in module.named_children():
        setattr(module, child_name, _fold_within(child, f"{name}.{child_name}", graphs, reasons))
    return module


def _fold_graph(module: nn.Module, graph: fx.Graph) -> nn.Module:
    modules = dict(module.named_modules(remove_duplicate=False))
    calls = Counter(modules[str(node.target)] for node in graph.nodes if node.op == "call_module")
    norms = {norm for norm in calls if type(norm) in (nn.BatchNorm2d, FusedBatchNorm2d)}
    foldable = {norm for norm in norms if calls[norm] == 1 and norm.running_mean is not None}
    others = []
    for site in find_sites(graph, module, foldable):
        if all(_is_foldable_into(call.args[0], modules, calls) for call in site.norms):
            _fold_site(graph, module, site)
        elif site.is_joint:
            others.append(site)
    for site in others:
        for call in site.norms:
            make_fused(module.get_submodule(str(call.target)))
    fuse(graph, module, others)
    return fx.GraphModule(module, graph).eval()


def _is_foldable_into(conv: Any, modules: dict[str, nn.Module], calls: Counter[nn.Module]) -> bool:
    """Whether it is a convolution, called once, whose output only the batch norm reads."""
    if not isinstance(conv, fx.Node) or conv.op != "call_module" or len(conv.users) != 1:
        return False
    module = modules[str(conv.target)]
    return type(module) is nn.Conv2d and calls[module] == 1 and len(conv.args) == 1


def _fold_site(graph: fx.Graph, root: nn.Module, site: Site) -> None:
    conv: Any = site.norm.args[0]
    if getattr(root.get_submodule(str(site.norm.target)), "relu", False):  # a FusedBatchNorm2d that ends in ReLU itself
        site = Site(site.norm, relu=site.norm)
    elif site.add is not None and not _may_move(conv, site.add, root):
        for call in site.norms:
            _fold_site(graph, root, Site(call))
        return
    for call in site.norms:
        source: Any = call.args[0]
        folded = FoldedConv2d(
            cast(nn.Conv2d, root.get_submodule(source.target)),
            cast(nn.BatchNorm2d, root.get_submodule(str(call.target))),
            relu=site.relu is not None and call is site.norm,
        )
        root.set_submodule(source.target, folded)
    with graph.inserting_before(site.add or site.norm):
        inputs = conv.args if site.add is None else (*conv.args, site.residual)
        node = graph.call_module(conv.target, inputs)
    put_in_place(graph, site, node)
    graph.erase_node(conv)


def _may_move(conv: fx.Node, addition: fx.Node, root: nn.Module) -> bool:
    """Whether a convolution reads the same where the addition is: whether all who read its input leave it alone."""
    source: Any = conv.args[0]
    others = [reader for reader in source.users if reader is not addition]
    return all(
        reader.op == "call_module" and isinstance(root.get_submodule(str(reader.target)), READERS) for reader in others
    )
