"""skip.png: training error, test error and each layer's gradient, with and without skip connections."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from resnet_fast.study.runs import EpochRow, GradientRow
from resnet_fast.study.settings import Network
from resnet_fast.training.curves import finish_panel

# Blue without skip connections, orange with them; deep networks darker and thicker. Distinct for the color-blind too.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#56b4e9", "linewidth": 1.6},
    {"color": "#00568c", "linewidth": 2.4},
    {"color": "#e69f00", "linewidth": 1.6},
    {"color": "#a33108", "linewidth": 2.4},
)
MOMENTS = {"start": (0, (2, 1.5)), "end": "-"}  # dashed and solid


def draw(
    epochs: Sequence[EpochRow], gradients: Sequence[GradientRow], networks: Sequence[Network], title: str
) -> Figure:
    """Return the figure: thick lines are means over the seeds, thin ones single seeds.

    Args:
        epochs, gradients: of all networks and seeds, as in the CSV files.
        networks: plain and shallow, plain and deep, then the two with skip connections.
        title: of the figure.
    """
    # Figure without pyplot: no global state, no window, and no backend to choose.
    figure = Figure(figsize=(13, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    train, test, norms = figure.subplots(1, 3)
    n_epochs = max(row.epoch for row in epochs)
    for network, style in zip(networks, STYLES, strict=True):
        own = [row for row in epochs if row.network == network.name]
        for axes, name in ((train, "train_error"), (test, "test_error")):
            _draw_seeds(axes, [(row.seed, row.epoch, 100 * getattr(row, name)) for row in own], style, network.name)
        for moment, dashes in MOMENTS.items():
            points = [(r.seed, r.layer, r.norm) for r in gradients if (r.network, r.moment) == (network.name, moment)]
            _draw_seeds(norms, points, {**style, "linestyle": dashes}, f"{network.name}, {moment}")
    for axes, name in ((train, "training error (%)"), (test, "test error (%)")):
        axes.set_ylim(0, 100)  # the full range, so that no difference looks exaggerated
        finish_panel(axes, name, n_epochs)
        axes.set_xlabel("epoch")
    norms.set_yscale("log")
    finish_panel(norms, "L2 norm of each layer's gradient", max(row.layer for row in gradients))
    norms.set_xlabel("convolution, from the input on")
    kinds = [Line2D([], [], color="#4b5563", linestyle=dashes) for dashes in MOMENTS.values()]
    norms.legend(kinds, [f"{moment} of training" for moment in MOMENTS], frameon=False, loc="upper right")
    handles = [Line2D([], [], **style) for style in STYLES]
    figure.legend(handles, [network.name for network in networks], frameon=False, ncols=4, loc="outside lower center")
    return figure


def _draw_seeds(axes: Axes, points: list[tuple[int, int, float]], style: dict[str, Any], label: str) -> None:
    """Draw a thin line for each seed and a thick one for the mean; points are (seed, x, y)."""
    seeds = sorted({seed for seed, _, _ in points})
    at = sorted({x for _, x, _ in points})
    if len(seeds) > 1:
        for seed in seeds:
            values = [y for s, _, y in sorted(points) if s == seed]
            axes.plot(at, values, **{**style, "linewidth": 0.7}, alpha=0.45, label="_seed")
    means = [mean(y for _, x, y in points if x == one) for one in at]
    # A single epoch would be invisible without a marker.
    axes.plot(at, means, label=label, marker="o" if len(at) == 1 else "", **style)
