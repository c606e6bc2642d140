"""`resnet-fast export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnet_fast.cli.app import choice_metavar, command, refusals, stop
from resnet_fast.common.checks import check_choice, check_path
from resnet_fast.training.paths import find_checkpoint

if TYPE_CHECKING:
    import torch

    from resnet_fast.inference import Trained

FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}
N_REAL = 16


@command("Write a trained network as ONNX and for torch.export.", "export runs/digits --format onnx")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or a checkpoint.", show_default=False)],
    format: Annotated[
        str,
        typer.Option(
            metavar=choice_metavar([*FORMATS, "both"]),
            help="Format to write. onnx: model.onnx, needs the extra export; torch: model.pt2.",
        ),
    ] = "both",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the files. [default: the run folder]", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Fixed number of images per call. [default: any number]", show_default=False),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the data used in the check. [default: as in training]", show_default=False),
    ] = None,
) -> None:
    """Write a trained network as ONNX and as a torch.export program, and check both.

    Both accept images in [0, 1], float32 [N, 3, size, size], normalize them, and return logits [N, classes].
    """
    with refusals():
        check_choice("format", format, (*FORMATS, "both"))
        find_checkpoint(run)
        if data_dir is not None:
            data_dir = check_path("data_dir", data_dir)

    from resnet_fast.data import DataError
    from resnet_fast.data.dataset import check_no_file
    from resnet_fast.inference import CheckpointError, ExportError, export_onnx, export_program, load_trained
    from resnet_fast.inference.export import need_onnx

    formats = list(FORMATS) if format == "both" else [format]
    try:
        trained = load_trained(run)
        if data_dir is not None:
            check_no_file(data_dir)
        if "onnx" in formats:
            need_onnx()
        real = real_images(trained, data_dir)
    except ValueError as error:
        stop(2, f"error: {error}")
    except ExportError as error:
        stop(1, f"error: {error}" + ("; --format torch needs no further package" if format == "both" else ""))
    except (CheckpointError, DataError, OSError) as error:
        stop(1, f"error: {error}")
    out = out or trained.path.parent
    size, n_classes, number = trained.image_size, len(trained.classes), batch_size or "N"
    print(trained.description)
    print(f"images, float32 [{number}, 3, {size}, {size}] in [0, 1] -> logits, float32 [{number}, {n_classes}]")
    beside = "no real ones (data missing, or of another size)" if real is None else f"{len(real)} real ones"
    print(f"largest difference of a logit from fp64, on random images and {beside}:\n", flush=True)
    try:
        for name in formats:
            file, write = FORMATS[name], export_onnx if name == "onnx" else export_program
            checked = write(trained, out / file, batch_size=batch_size, images=real)
            print(
                f"{file:<10}  {checked.n_bytes / 1e6:6.1f} MB  {checked.error:.1e}, "
                f"allowed {checked.allowed:.1e}; eager {checked.eager_error:.1e}",
                flush=True,
            )
    except KeyboardInterrupt:
        stop(130, "interrupted")
    except (ExportError, OSError) as error:
        stop(1, f"error: {error}")
    print(f"\n{', '.join(FORMATS[name] for name in formats)}: {out}")


def real_images(trained: "Trained", data_dir: Path | None) -> "torch.Tensor | None":
    """Return some test images, or None if the data are missing or of another size. Download nothing."""
    from resnet_fast.data import DataError, load_dataset
    from resnet_fast.data.options import DOWNLOADED
    from resnet_fast.data.torchvision_sets import is_there

    folder = Path(data_dir or trained.config["data_dir"])
    try:
        if trained.config["dataset"] in DOWNLOADED and not is_there(trained.config["dataset"], folder):
            return None
        dataset = load_dataset(
            trained.config["dataset"],
            folder,
            image_size=trained.image_size,
            skip_unreadable=trained.config["skip_unreadable"],
        )
        images = next(iter(dataset.test.batches(N_REAL)))[0]
    except (DataError, OSError):  # OSError: a name that is too long, a folder that cannot be listed
        return None
    return images if images.shape[2:] == (trained.image_size, trained.image_size) else None
