"""Batch norm folded into convolutions, for inference.

    bn(conv(x)) = conv'(x),   W' = W · s,   b' = (b - mean) · s + bias,   s = weight / sqrt(var + eps)

per output channel, with the running statistics (Jacob et al. 2018, arXiv:1712.05877, section 3.2).
"""

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import functional
from ..common.checks import few
from ..models.blocks import has_own_hook
from .convert import check_is_module, check_is_not_compiled, make_fused, restore, trace_all, why_opaque
from .rewrite import add, changes_nothing, fuse, put_in_place
from .sites import BATCH_NORMS, Site, find_sites
from .trace import FOREIGN

MOST_REASONS = 3  # the number that an error names


class FoldedConv2d(nn.Conv2d):
    """A convolution with a bias that can add a residual and end in ReLU: relu(conv(x) + bias + residual).

    On the Triton backend the bias is added in the same pass as the residual and the ReLU, elsewhere by the convolution.

    Args:
        conv, norm: the modules to fold; neither is changed. Weights are computed in fp64 and rounded once.
        relu: whether to end in ReLU.
        in_place: the operand that an in-place addition changes if shapes or types differ, as `Site.in_place`.
    """

    bias: nn.Parameter
    zeros: Tensor
    ones: Tensor

    def __init__(self, conv: nn.Conv2d, norm: Any, relu: bool, in_place: str = "") -> None:
        shape: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        super().__init__(conv.in_channels, conv.out_channels, *shape, padding_mode=conv.padding_mode, device="meta")
        self.relu, self.in_place = relu, in_place
        weight, bias = _folded(conv, norm)
        self.weight = nn.Parameter(weight, conv.weight.requires_grad)
        self.bias = nn.Parameter(bias, conv.weight.requires_grad)
        # Statistics for a batch norm that leaves values unchanged.
        self.register_buffer("zeros", torch.zeros_like(bias), persistent=False)
        self.register_buffer("ones", torch.ones_like(bias), persistent=False)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return conv(input) + bias + residual, followed by ReLU if `self.relu`.

        `input` and `residual` are [N, C, H, W], in the weight's type or under autocast. A residual with another shape
        or type than the convolution's output is added as in eager PyTorch.
        """
        # On ATen the convolution adds the bias, which would otherwise need its own pass.
        in_one_pass = functional.choose_backend(input) == "triton"
        y = self._conv_forward(input, self.weight, None if in_one_pass else self.bias)
        fits = residual is None or (residual.shape == y.shape and residual.dtype == y.dtype)
        if in_one_pass:
            norm = (self.zeros, self.ones, None, self.bias)
            y = functional.batch_norm_add_relu(
                y, *norm, eps=0.0, residual=residual if fits else None, relu=self.relu and fits
            )
            if fits:
                return y
        if residual is not None:
            y = add(y, residual, "norm" if fits else self.in_place)  # nothing else reads the convolution's output
        return F.relu(y, inplace=True) if self.relu else y

    def extra_repr(self) -> str:
        return super().extra_repr() + (", relu=True" if self.relu else "")


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return W' and b' in the type and memory format of the convolution's weight."""
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


def fold_batch_norm(model: nn.Module) -> fx.GraphModule:
    """Return a copy of a model for inference with its batch norms folded into the convolutions before them.

    A batch norm is folded if torch.fx shows that nothing else reads its convolution's output. The addition and the ReLU
    that follow run in the convolution's module. Other batch norms that are called once are fused with what follows
    them. Modules that torch.fx cannot follow are called unchanged. The copy is in evaluation mode, has other keys, and
    is not for training.

    Numerics: weights are computed in fp64 and rounded once, to the type of the convolution's weight.

    Args:
        model: any model, ours, converted or plain, in any mode; it is not changed.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: torch.fx cannot follow the model's own forward, the model has hooks or patched forwards, which would
            be lost, it is compiled or cannot be copied, or nothing can be folded. The message names the module.
    """
    check_is_module(model)
    check_is_not_compiled(model)
    for name, module in model.named_modules():
        if has_own_hook(module):
            raise ValueError(f"{name or 'model'} must have no hooks and no patched forward, which folding would lose")
    try:
        copied = restore(copy.deepcopy(model)).eval()
    except RuntimeError as error:
        raise ValueError(f"model cannot be folded, because it cannot be copied: {error}") from error
    traced, opaque = trace_all(copied, frozen=True, leaves=FOREIGN)
    if copied not in traced:
        raise ValueError(f"model cannot be folded: {opaque.get(copied, 'it holds no modules')}")
    graph = traced[copied].graph
    if not _fold_graph(copied, graph):
        norms = [(name, module) for name, module in copied.named_modules() if isinstance(module, _BatchNorm)]
        reasons = list(dict.fromkeys(_why_not(copied, name, norm, opaque) for name, norm in norms))
        raise ValueError(f"model cannot be folded: {few(reasons, MOST_REASONS, '; ') or 'it has no batch norm'}")
    return fx.GraphModule(copied, graph).eval()


def _why_not(model: nn.Module, name: str, norm: _BatchNorm, opaque: Mapping[nn.Module, str]) -> str:
    if type(norm) not in BATCH_NORMS:
        return f"{name} is a {type(norm).__name__}, not an nn.BatchNorm2d"
    if norm.running_mean is None:
        return f"{name} has no running statistics"
    if reason := why_opaque(model, name, opaque):
        return reason
    return f"{name} does not follow an nn.Conv2d that is called once and whose output nothing else reads"


def _fold_graph(root: nn.Module, graph: fx.Graph) -> int:
    """Fold all sites that can be folded, fuse the others, and return the number of folded sites."""
    modules = dict(root.named_modules(remove_duplicate=False))
    calls = Counter(modules[str(node.target)] for node in graph.nodes if node.op == "call_module")
    norms = {norm for norm in calls if type(norm) in BATCH_NORMS and getattr(norm, "running_mean", None) is not None}
    sites = find_sites(graph, root, norms)
    folded = [site for site in sites if all(_is_foldable_into(call.args[0], modules, calls) for call in site.norms)]
    for site in folded:
        _fold_site(graph, root, site, modules)
    others = [site for site in sites if site not in folded and site.is_joint]
    others = [site for site in others if all(calls[modules[str(call.target)]] == 1 for call in site.norms)]
    for site in others:
        for call in site.norms:
            make_fused(modules[str(call.target)])
    fuse(graph, root, others)
    return len(folded)


def _is_foldable_into(conv: Any, modules: dict[str, nn.Module], calls: Counter[nn.Module]) -> bool:
    """Return whether it is a convolution that is called once and whose output only the batch norm reads."""
    if not isinstance(conv, fx.Node) or conv.op != "call_module" or len(conv.users) != 1:
        return False
    module = modules[str(conv.target)]
    return type(module) is nn.Conv2d and calls[module] == 1 and len(conv.args) == 1


def _fold_site(graph: fx.Graph, root: nn.Module, site: Site, modules: dict[str, nn.Module]) -> None:
    conv: Any = site.norm.args[0]
    if getattr(modules[str(site.norm.target)], "relu", False):  # a FusedBatchNorm2d that ends in ReLU itself
        site = Site(site.norm, relu=site.norm)
    elif site.add is not None and not _may_move(conv, site, modules):
        for call in site.norms:
            _fold_site(graph, root, Site(call), modules)
        return
    for call in site.norms:
        source: Any = call.args[0]
        is_last = call is site.norm
        folded = FoldedConv2d(
            cast(nn.Conv2d, modules[source.target]),
            cast(nn.BatchNorm2d, modules[str(call.target)]),
            relu=is_last and site.relu is not None,
            in_place=site.in_place if is_last else "",
        )
        root.set_submodule(source.target, folded)
    with graph.inserting_before(site.add or site.norm):
        inputs = conv.args if site.add is None else (*conv.args, site.residual)
        node = graph.call_module(conv.target, inputs)
    put_in_place(graph, site, node)
    graph.erase_node(conv)


def _may_move(conv: fx.Node, site: Site, modules: dict[str, nn.Module]) -> bool:
    """Return whether a convolution can move to the addition, because no step in between may change a tensor."""
    node, own = conv.next, {*site.norms, *site.between}
    while node is not site.add:
        if node not in own and not changes_nothing(node, modules):
            return False
        node = node.next
    return True
