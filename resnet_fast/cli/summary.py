"""`resnet-fast summary`."""

from typing import TYPE_CHECKING, Annotated

import typer

from resnet_fast.cli.app import command, stop
from resnet_fast.cli.settings import option
from resnet_fast.models.registry import MODELS, check_name, check_stem, get_model
from resnet_fast.training.config import IMAGE_SIZE, SETTINGS, TrainConfig

if TYPE_CHECKING:
    from resnet_fast.models.summary import Summary

N_CLASSES = 10


@command("Print the layers of a network.", "summary resnet20 --num-classes 100")
def summary(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=SETTINGS["model"].help)] = TrainConfig.model,
    stem: Annotated[str | None, option("stem")] = None,
    image_size: Annotated[
        int, typer.Option(min=1, max=2**20, help="Height and width of the images, in pixels.")
    ] = IMAGE_SIZE,
    num_classes: Annotated[
        int, typer.Option(min=1, max=2**31, help="Number of outputs of the last layer.")
    ] = N_CLASSES,
) -> None:
    """Print the layers of a network with their output shapes and parameters, and the totals."""
    try:
        check_name(model)
        stem = stem or MODELS[model].stems[0]
        check_stem(model, stem)
    except ValueError as error:
        stop(2, f"error: {error}")

    import torch
    from torch import nn

    from resnet_fast.models.summary import summarize

    try:
        with torch.device("meta"):  # shapes only, whatever the size
            network = get_model(model, num_classes=num_classes, stem=stem, norm_layer=nn.BatchNorm2d)
            totals = summarize(network, image_size)
    except ValueError as error:
        stop(2, f"error: {error}")
    except RuntimeError as error:
        stop(2, f"error: {model} does not support images of {image_size}x{image_size} pixels: {error}")
    family = MODELS[model].family
    print(f"{model} ({family}), {stem} stem, images of 3x{image_size}x{image_size}, {num_classes} classes\n")
    print("\n".join(format_summary(totals)))


def format_summary(totals: "Summary") -> list[str]:
    """Return the table and its totals, in 80 columns."""
    lines = [f"{'layer':<24}  {'output, for each image':<24}  {'parameters':>14}"]
    for i, row in enumerate(totals.rows, 1):
        shape = " x ".join(map(str, row.shape))
        lines.append(f"{row.layer + '-' + str(i):<24}  {shape:<24}  {row.parameters:>14,}")
    lines += ["", f"{totals.trainable:>12,}  trainable parameters"]
    if totals.n_repeated:
        lines += [
            f"{totals.row_total:>12,}  all rows added up: {totals.n_repeated} modules run in several places and count",
            f"{'':>12}  in each, which is {totals.row_total - totals.trainable:,} more",
        ]
    lines += [
        f"{totals.trainable + totals.running:>12,}  trainable parameters and the "
        f"{totals.running:,} running statistics, a",
        f"{'':>12}  mean and a variance for each channel of a batch norm",
        "",
        "Rows are the steps of plain PyTorch. The fused backend runs consecutive batch",
        "norm, addition and ReLU as one.",
    ]
    return lines
