"""The layer table of a network: one row per module call in a forward pass, with output shape and parameters.

table = summarize(article(), image_size=32)
table.rows[0]       # Row(layer="Conv2d", shape=(64, 14, 14), parameters=9472)
table.trainable     # 8522186

If a module runs twice, both rows have its parameters, as in the article; torchinfo calls the second "(recursive)".
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

CONTAINERS = (nn.Sequential, nn.ModuleList)


class Row(NamedTuple):
    """One call of a module: its class, the shape of its output without the batch, its own number of parameters."""

    layer: str
    shape: tuple[int, ...]
    parameters: int


class Summary(NamedTuple):
    """A network's rows and totals.

    Args:
        rows: in the order in which the calls end, so that a block follows its contents.
        trainable: number of parameters that require a gradient, each counted once.
        running: number of running statistics of the batch norms, each counted once, without the batch counters.
        n_repeated: number of modules with parameters that run more than once.
    """

    rows: list[Row]
    trainable: int
    running: int
    n_repeated: int

    @property
    def row_total(self) -> int:
        """The sum over all rows; parameters of a module that runs twice count twice."""
        return sum(row.parameters for row in self.rows)


def summarize(model: nn.Module, image_size: int) -> Summary:
    """Run a network in evaluation mode on an image of zeros and return its layer table; the network is unchanged.

    Args:
        model: a network for images [N, 3, image_size, image_size]. On the meta device nothing is computed.
        image_size: height and width in pixels.

    Raises:
        RuntimeError: the network does not support images of that size.
    """
    rows: list[Row] = []
    runs: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        rows.append(Row(type(module).__name__, tuple(output.shape[1:]), own))
        runs[module] = runs.get(module, 0) + (own > 0)

    noted = [m for m in model.modules() if m is not model and not isinstance(m, CONTAINERS)]
    handles = [module.register_forward_hook(note) for module in noted]
    modes = {module: module.training for module in model.modules()}
    a_parameter = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, image_size, image_size, device=a_parameter.device, dtype=a_parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return Summary(
        rows,
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        sum(buffer.numel() for name, buffer in model.named_buffers() if "running_" in name),
        sum(count > 1 for count in runs.values()),
    )
