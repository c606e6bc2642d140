"""The folder of a study: config.json, skip.csv, gradients.csv and skip.png, each complete or absent.

The tables grow after each network; the picture is drawn at the end.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from resnet_fast.common.files import whole_file
from resnet_fast.data import Augmentation, ImageDataset
from resnet_fast.study.picture import draw
from resnet_fast.study.runs import GRADIENT_IMAGES, EpochRow, GradientRow, Trained
from resnet_fast.study.settings import SkipStudy
from resnet_fast.training.paths import check_is_free
from resnet_fast.training.recipes import RECIPE_FIELDS
from resnet_fast.training.run_folder import run_settings

NAMES = ("skip.png", "skip.csv", "gradients.csv", "config.json")
# The entries of a training run's config.json that a study also has.
DESCRIBED = (
    *RECIPE_FIELDS,
    *("dataset", "data_dir", "device", "precision", "graph", "classes", "train_images", "test_images", "mean", "std"),
    *("versions", "threads", "device_name"),
)


class StudyFolder:
    """Writes the files of one study.

    Args:
        study: the settings, which name the folder.
        dataset: the training and test images.
        augmentation: of the training images.
    """

    def __init__(self, study: SkipStudy, dataset: ImageDataset, augmentation: Augmentation) -> None:
        self.study, self.dataset, self.augmentation = study, dataset, augmentation
        self.out = study.config.out

    def start(self) -> None:
        """Create the folder and write config.json; raise FileExistsError if the folder is not empty."""
        check_is_free(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.describe(), indent=2, ensure_ascii=False) + "\n"
        with whole_file(self.out / "config.json") as file:
            file.write(text.encode())

    def describe(self) -> dict[str, Any]:
        """Return the contents of config.json."""
        study = self.study
        settings = run_settings(study.config, self.dataset, self.augmentation)
        return {
            "study": "skip",
            "networks": [network.name for network in study.networks],
            "width": study.width,
            "seeds": list(study.seeds),
            "image_size": self.dataset.train.size[0],
            "gradient_images": min(GRADIENT_IMAGES, len(self.dataset.train)),
            **{name: settings[name] for name in DESCRIBED},
        }

    def write_tables(self, done: Sequence[Trained]) -> None:
        """Rewrite both tables with the networks trained so far."""
        for name, kind, rows in (
            ("skip.csv", EpochRow, [row for trained in done for row in trained.epochs]),
            ("gradients.csv", GradientRow, [row for trained in done for row in trained.gradients]),
        ):
            with whole_file(self.out / name) as file:
                file.write(_table(kind, rows).encode())

    def write_picture(self, done: Sequence[Trained]) -> None:
        """Draw skip.png from all networks."""
        epochs = [row for trained in done for row in trained.epochs]
        gradients = [row for trained in done for row in trained.gradients]
        figure = draw(epochs, gradients, self.study.networks, self.title)
        with whole_file(self.out / "skip.png") as file:
            figure.savefig(file, format="png")

    @property
    def title(self) -> str:
        """The data set, its size, and the numbers of channels, epochs and seeds."""
        height, width = self.dataset.train.size
        epochs, seeds = self.study.config.epochs, len(self.study.seeds)
        return (
            f"With and without skip connections: {self.dataset.name}, {height}x{width}, {self.study.width} channels, "
            f"{epochs} epoch{'s' * (epochs > 1)}, {seeds} seed{'s' * (seeds > 1)}"
        )


def _table(kind: type, rows: Sequence[Any]) -> str:
    text = io.StringIO()
    names = [field.name for field in fields(kind)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        values = asdict(row).values()
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
    return text.getvalue()


def read_table(path: Path, kind: type) -> list[Any]:
    """Return the rows of a table that `write_tables` wrote."""
    with open(path, newline="", encoding="utf-8") as file:
        return [kind(**{f.name: f.type(row[f.name]) for f in fields(kind)}) for row in csv.DictReader(file)]  # type: ignore[operator]
