"""The layer table of a network: a row for every step of a forward pass, with its output and its parameters.

table = summarize(article(), image_size=32)
table.rows[0]       # Row(layer="Conv2d", shape=(64, 14, 14), parameters=9472)
table.trainable     # 8522186

torchinfo prints a module that runs twice once with parameters and once as "(recursive)"; here, as in the article, each
of its rows has them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

CONTAINERS = (nn.Sequential, nn.ModuleList)


class Row(NamedTuple):
    """A module that has run: its class, the shape of its output without the batch, and the parameters of its own."""

    layer: str
    shape: tuple[int, ...]
    parameters: int


class Summary(NamedTuple):
    """A network by its steps.

    Args:
        rows: in the order in which they end; a block comes after what is inside.
        trainable: parameters that require a gradient, each counted once.
        running: running statistics of the batch norms, each counted once, without the counts of batches.
        n_repeated: modules with parameters that run more than once.
    """

    rows: list[Row]
    trainable: int
    running: int
    n_repeated: int

    @property
    def row_total(self) -> int:
        """The parameters of all rows: those of a module that runs twice count twice."""
        return sum(row.parameters for row in self.rows)


def summarize(model: nn.Module, image_size: int) -> Summary:
    """Run a network in evaluation mode on an image of zeros and return what ran; nothing of it is changed.

    Args:
        model: takes [N, 3, image_size, image_size]. On the meta device nothing is computed.
        image_size: pixels, in height and width.

    Raises:
        RuntimeError: the network cannot take images of that size.
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
