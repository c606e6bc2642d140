"""Assign operators and kernels to categories, by the innermost name that matches, from the kernel out to the step.

    names:     void nchwToNhwc… < aten::cudnn_convolution < aten::conv2d < training step    -> layout and casts
    innermost:                    aten::copy_ < aten::to < aten::conv2d < training step      -> layout and casts
    a view:                       aten::t < aten::linear < training step                     -> convolution, linear

Everything that the optimizer runs counts as optimizer, including its copies and the checks of fp16's loss scale. All
other additions count as "batch norm + add + ReLU": those of a block, and autograd's additions of the two gradients of a
block's input. The fused kernels compute both.
"""

import re
from collections.abc import Iterable

CONVOLUTION = "convolution, linear"
NORM = "batch norm + add + ReLU"
LAYOUT = "layout and casts"
OPTIMIZER = "optimizer"
LOSS = "loss"
OTHER = "pooling, other"
# In the order of the tables and bars; the rest of the step follows as "idle" or "between operators".
CATEGORIES = (CONVOLUTION, NORM, LAYOUT, OPTIMIZER, LOSS, OTHER)

# Names of autograd's nodes, and of events such as "autograd::engine::evaluate_function: XBackward0".
_NODE = r"Backward\d*$"
_SAYS = {
    LAYOUT: rf"^aten::(to|_to_copy|copy_|contiguous|clone)$|ToCopy{_NODE}|nchwToNhwc|nhwcToNchw",
    NORM: r"^resnet_fast::|^aten::\w*batch_norm\w*$|^aten::(add_?|relu_?|clamp_min_?|threshold(_backward)?)$"
    rf"|(BatchNorm|BatchNormAddReLU|Pair|Relu){_NODE}|_(BatchNormAddReLU|Pair)$",
    CONVOLUTION: rf"^aten::\w*conv(2d|olution)\w*$|^aten::(linear|addmm|mm)$|(Convolution|Addmm){_NODE}|^conv3x3",
    LOSS: rf"^aten::(cross_entropy_loss|\w*log_softmax\w*|nll_loss\w*|ones_like)$|(LogSoftmax|NllLoss\w*?){_NODE}",
    OPTIMIZER: r"^aten::_amp_",
    OTHER: rf"^aten::(\w*pool2d\w*|mean)$|(Mean|\w*Pool\w*?){_NODE}",
}
_RULES = {category: re.compile(pattern) for category, pattern in _SAYS.items()}
_OPERATOR = re.compile(r"^(?!autograd::|torch::)\w+::")


def category_of(names: Iterable[str]) -> str:
    """Return the category of an event.

    Args:
        names: of the kernel, if it is one, its operator, and the operator's ancestors, innermost first.

    Returns:
        One of CATEGORIES; "pooling, other" if no name matches.
    """
    names = list(names)
    if any(name.startswith("Optimizer.") for name in names):
        return OPTIMIZER
    for name in names:
        for category, rule in _RULES.items():
            if rule.search(name):
                return category
    return OTHER


def is_operator(name: str) -> bool:
    """Return whether an event belongs to an operator, rather than to autograd or an annotation that calls it."""
    return _OPERATOR.search(name) is not None
