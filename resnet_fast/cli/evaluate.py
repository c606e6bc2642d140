"""`resnet-fast eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.cells import cell_len

from resnet_fast.cli.app import choice_metavar, command, refusals, stop
from resnet_fast.cli.settings import option
from resnet_fast.cli.text import WIDTH, fit, head
from resnet_fast.common.checks import check_choice, check_path, difference
from resnet_fast.common.terminal import clean
from resnet_fast.training.config import SETTINGS, choose_device, choose_precision
from resnet_fast.training.paths import find_checkpoint

if TYPE_CHECKING:
    import torch

    from resnet_fast.evaluation import Predictions
    from resnet_fast.inference import Trained

SPLITS = ("test", "train", "validation")
MAX_ROWS = 20  # of the table of classes
MAX_MATRIX = 10  # classes in a confusion matrix of 80 columns
NAME_WIDTH = 24


@command("Test a trained network: accuracy, confusion, mistakes.", "eval runs/digits", "eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or a checkpoint.", show_default=False)],
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data. [default: as in training]", show_default=False)
    ] = None,
    device: Annotated[str, option("device")] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images per batch. [default: twice the batch size of the training]", show_default=False
        ),
    ] = None,
    precision: Annotated[str | None, option("precision", "Precision of the network. [default: as in training]")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar=choice_metavar(SPLITS),
            help="Images to test. [default: test; validation, the images held out, for a run with --holdout]",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read an image folder.")] = 0,
    skip_unreadable: Annotated[
        bool | None,
        typer.Option(help="Leave out images that cannot be read. [default: as in training]", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the files. [default: the run folder]", show_default=False)
    ] = None,
) -> None:
    """Test a trained network: accuracy by class, confusion.png, mistakes.png and predictions.csv."""
    with refusals():
        if split is not None:
            check_choice("split", split, SPLITS)
        if precision is not None:
            SETTINGS["precision"].check(precision)
        if data_dir is not None:
            data_dir = check_path("data_dir", data_dir)
        find_checkpoint(run)
        chosen = choose_device(device)

    import torch

    from resnet_fast.data import DataError, load_dataset
    from resnet_fast.evaluation import image_paths, predict_split, write_pictures, write_predictions
    from resnet_fast.inference import CheckpointError, load_trained

    with refusals(CheckpointError):
        trained = load_trained(run, chosen)
    config = trained.config
    used = precision or config["precision"]
    used = choose_precision(chosen) if used == "auto" else used
    # As in training; with another batch size the last digits differ.
    at_once = batch_size or 2 * config["batch_size"]
    out = out or trained.path.parent
    reported = "validation" if config["holdout"] else "test"
    split = split or reported
    if split == "validation" and not config["holdout"]:
        stop(2, f"error: split validation needs a run with --holdout, got {run} without it")
    suffix = "" if split == reported else f"-{split}"
    try:
        dataset = load_dataset(
            config["dataset"],
            data_dir or config["data_dir"],
            image_size=trained.image_size,
            workers=workers,
            skip_unreadable=config["skip_unreadable"] if skip_unreadable is None else skip_unreadable,
        )
        if unlike := difference(trained.classes, dataset.classes, "the network", "the data folder"):
            raise DataError(
                f"the network knows {len(trained.classes)} classes, the data have {len(dataset.classes)}: {unlike}"
            )
        if config["holdout"] and split != "test":
            dataset = dataset.hold_out(config["holdout"])
        images = dataset.train if split == "train" else dataset.test
        print(f"{trained.description}: {len(images):,} {split} images, {len(dataset.classes)} classes")
        print(f"{chosen}, {used}, batch {at_once}", *(clean(f"note: {note}") for note in dataset.notes), sep="\n")
        print(flush=True)
        predictions = predict_split(
            trained.model,
            images.to(chosen, "stream"),  # each image is read once
            trained.mean,
            trained.std,
            batch_size=at_once,
            precision=used,
            # Unless the data or the user say that a mirror image shows something else.
            flip=dataset.flip and config["flip"] != "none",
        )
        # Before the results are printed: `| head` closes the pipe.
        out.mkdir(parents=True, exist_ok=True)
        title = f"{trained.description}, {split} images"
        names = write_pictures(out, predictions, trained.classes, title, suffix)
        table = f"predictions{suffix}.csv"
        write_predictions(out / table, predictions, trained.classes, image_paths(images))
        print("\n".join(format_evaluation(predictions, trained)), flush=True)
    except KeyboardInterrupt:
        stop(130, "interrupted")
    except ValueError as error:
        stop(2, f"error: {error}")
    except (DataError, OSError, torch.OutOfMemoryError) as error:
        stop(1, f"error: {error}")
    print(f"\n{', '.join([*names, table])}: {out}")


def format_evaluation(predictions: "Predictions", trained: "Trained") -> list[str]:
    """Return the results: totals, a line per class, and the confusion matrix if it fits 80 columns."""
    lines = [
        f"accuracy     {100 * predictions.accuracy:6.2f} %  {predictions.n_correct:,} of {len(predictions):,}",
        f"loss         {predictions.loss:6.4f}",
    ]
    if predictions.flip_accuracy is not None:
        lines.insert(
            1, f"with flip    {100 * predictions.flip_accuracy:6.2f} %  mean logits of each image and its mirror image"
        )
    confusion = predictions.confusion(len(trained.classes))
    return [*lines, "", *_class_table(confusion, trained.classes), *_matrix(confusion, trained.classes)]


def _class_table(confusion: "torch.Tensor", classes: tuple[str, ...]) -> list[str]:
    names = [clean(name) for name in classes]
    width = min(NAME_WIDTH, max(map(cell_len, ["class", *names])))
    rows = []
    for i, counts in enumerate(confusion.tolist()):
        total, right = sum(counts), counts[i]
        counts[i] = 0
        taken_for = f"{names[counts.index(max(counts))]} ({max(counts):,})" if any(counts) else "-"
        shown = f"{100 * right / total:.2f} %" if total else "-"
        line = f"{fit(names[i], width)}  {total:>7,}  {shown:>8}  {taken_for}"
        rows.append((right / total if total else 2, fit(line, WIDTH).rstrip()))
    header = f"{'class':<{width}}   images  accuracy  most often taken for"
    if len(rows) <= MAX_ROWS:
        return [header, *(line for _, line in rows)]
    worst = sorted(rows, key=lambda row: row[0])[:MAX_ROWS]
    return [header, *(line for _, line in worst), f"(the {MAX_ROWS} worst of {len(rows)} classes)"]


def _matrix(confusion: "torch.Tensor", classes: tuple[str, ...]) -> list[str]:
    if len(classes) > MAX_MATRIX:
        return []
    names = [clean(name) for name in classes]
    first = min(16, max(map(cell_len, names)))
    widest = max(len(f"{confusion.max():,}"), *map(cell_len, names))
    width = min(widest + 2, (WIDTH - first) // len(classes))
    if len(str(int(confusion.max()))) >= width:
        return []
    # Long names are cut; columns are in the order of the rows.
    header = "".join(" " * (width - cell_len(name)) + name for name in (head(name, width - 1) for name in names))
    lines = ["", "confusion matrix, a row for each true class, a column for each predicted one:"]
    lines.append(" " * first + header)
    for name, row in zip(names, confusion.tolist(), strict=True):
        lines.append(fit(name, first) + "".join(f"{count or '.':>{width}}" for count in row))
    return lines
