"""`resnet-fast predict`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.cells import cell_len

from resnet_fast.cli.app import command, complain, refusals, stop
from resnet_fast.cli.settings import option
from resnet_fast.cli.text import WIDTH, can_show, fit, fit_path
from resnet_fast.common.terminal import clean
from resnet_fast.training.config import choose_device
from resnet_fast.training.paths import find_checkpoint

if TYPE_CHECKING:
    import torch

    from resnet_fast.inference import Trained

BAR = 30  # columns


@command("Classify image files.", "predict runs/pets cat.png dog.jpg --top 3")
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or a checkpoint.", show_default=False)],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE", help="Image files in any format that Pillow reads.", show_default=False),
    ],
    top: Annotated[int, typer.Option(min=1, help="Number of classes to show, the most probable first.")] = 5,
    device: Annotated[str, option("device")] = "auto",
) -> None:
    """Classify image files: show the most probable classes of each.

    Images are read as in training on a folder, and resized bilinearly to the size of the training images; the aspect
    ratio is not kept. The network runs in fp32, without augmentation.
    """
    with refusals():
        find_checkpoint(run)
        chosen = choose_device(device)

    import torch

    from resnet_fast.inference import CheckpointError, ImageError, classify, load_trained, read_image

    with refusals(CheckpointError):
        trained = load_trained(run, chosen)
    n_failed = 0
    try:
        for path in images:
            try:
                image = read_image(path, trained.image_size)
            except ImageError as error:
                complain(f"resnet-fast: error: {error}")
                n_failed += 1
                continue
            probabilities = classify(trained, image)
            if not bool(probabilities.isfinite().all()):
                stop(
                    1, f"error: the network's output for {path} is not finite: its weights are too large or not finite"
                )
            for line in format_prediction(path, probabilities, trained, top):
                print(line, flush=True)
    except KeyboardInterrupt:
        stop(130, "interrupted")
    except torch.OutOfMemoryError as error:
        stop(1, f"error: {error}")
    if n_failed:
        stop(1, f"{n_failed} of {len(images)} images could not be read")


def format_prediction(path: Path, probabilities: "torch.Tensor", trained: "Trained", top: int) -> list[str]:
    """Return the file's name and a line per class: name, probability, bar."""
    values, indices = probabilities.topk(min(top, len(trained.classes)))
    names = [clean(trained.classes[index]) for index in indices.tolist()]
    width = min(max(map(cell_len, names)), WIDTH - BAR - 14)
    block = "█" if can_show("█") else "#"
    lines = [fit_path(clean(str(path)), WIDTH)]
    for name, value in zip(names, values.tolist(), strict=True):
        lines.append(f"  {fit(name, width)}  {100 * value:6.2f} %  {block * round(BAR * value)}".rstrip())
    return lines
