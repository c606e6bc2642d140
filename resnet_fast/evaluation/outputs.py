"""The files of an evaluation, confusion.png, mistakes.png and predictions.csv, each complete or absent."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from resnet_fast.common.files import whole_file
from resnet_fast.data import Split
from resnet_fast.data.folder import FolderSplit
from resnet_fast.evaluation.confusion import draw_confusion
from resnet_fast.evaluation.mistakes import describe_mistakes, draw_mistakes
from resnet_fast.evaluation.predictions import Predictions


def write_pictures(
    folder: Path, predictions: Predictions, classes: Sequence[str], title: str = "", suffix: str = ""
) -> list[str]:
    """Write confusion.png and mistakes.png, with `suffix` before the ".png"; return their names."""
    confusion, mistakes = f"confusion{suffix}.png", f"mistakes{suffix}.png"
    result = f"{100 * predictions.accuracy:.2f} % of {len(predictions):,} images right"
    with whole_file(folder / confusion) as file:
        draw_confusion(file, predictions.confusion(len(classes)), classes, f"{title}: {result}" if title else result)
    worst = predictions.mistakes
    with whole_file(folder / mistakes) as file:
        draw_mistakes(
            file,
            worst.images,
            worst.labels,
            worst.predictions,
            worst.probabilities,
            classes,
            n=len(worst.labels),
            title=describe_mistakes(len(worst.labels), len(predictions) - predictions.n_correct, len(predictions)),
        )
    return [confusion, mistakes]


def write_predictions(
    path: Path, predictions: Predictions, classes: Sequence[str], paths: Sequence[str] | None
) -> None:
    """Write a CSV with a row per image: index, label, prediction, probability and, if given, path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "label", "prediction", "probability", *(["path"] if paths is not None else [])])
    columns = (predictions.labels.tolist(), predictions.predictions.tolist(), predictions.probabilities.tolist())
    for index, (label, prediction, probability) in enumerate(zip(*columns, strict=True)):
        row = [index, classes[label], classes[prediction], f"{probability:.6g}"]
        writer.writerow(row if paths is None else [*row, paths[index]])
    with whole_file(path) as file:
        # Python reads bytes of a file name that are not UTF-8 as lone surrogates; this restores the bytes.
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))


def image_paths(split: Split) -> list[str] | None:
    """Return the path of each image of a folder split, in its order; None for other data sets."""
    return [path for path, _ in split.images.samples] if isinstance(split, FolderSplit) else None
