"""What a training run is: every setting, its default, and the one place where settings are checked."""

import itertools
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resnet_fast import resnet18, resnet34, resnet50, resnet101, resnet152
from resnet_fast.data import DATASETS
from resnet_fast.training.schedule import SCHEDULES

MODELS = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
}
STEMS = ("cifar", "imagenet")
PRECISIONS = ("auto", "fp32", "bf16")


class Recipe(NamedTuple):
    """The defaults that depend on the data set."""

    epochs: int
    batch_size: int
    lr: float


RECIPES = {
    "cifar10": Recipe(epochs=30, batch_size=128, lr=0.1),
    "digits": Recipe(epochs=6, batch_size=32, lr=0.1),
    "folder": Recipe(epochs=30, batch_size=128, lr=0.1),
}

# Any, so that a field may be `int` to those who read it although its default is filled in by __post_init__.
FROM_RECIPE: Any = None


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. Once made, every field holds the value that will be used: nothing is None or "auto".

    Args:
        model: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152".
        stem: "cifar" (3x3, no pooling) or "imagenet" (7x7 stride 2 and max-pooling).
        dataset: "cifar10", "digits" or "folder".
        data_dir: where CIFAR-10 lies or is downloaded to, or the folder with train/ and test/.
        image_size: pixels to which the images of "folder" are resized.
        epochs, batch_size, lr: see RECIPES for the defaults; lr is the peak of the schedule.
        flip: mirror half of the training images; None: as the data set says (yes, but not for digits).
        schedule: "one-cycle" or "triangular".
        weight_decay: of every parameter.
        momentum: Nesterov's; 0 is plain SGD.
        seed: of the initial weights, the order of the images and the augmentation.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "fp32", "bf16" (autocast, weights in fp32) or "auto": bf16 where the processor computes in it.
        workers: processes that read the images of "folder"; None: one per processor, at most 4.
        out: the run folder; None: runs/<dataset>-<model>-<time>.

    Raises:
        ValueError: a setting breaks its rule; the message names the rule and the value.
    """

    model: str = "resnet18"
    stem: str = "cifar"
    dataset: str = "cifar10"
    data_dir: Path = Path("data")
    image_size: int = 32
    epochs: int = FROM_RECIPE
    batch_size: int = FROM_RECIPE
    lr: float = FROM_RECIPE
    flip: bool | None = None
    schedule: str = "one-cycle"
    weight_decay: float = 5e-4
    momentum: float = 0.9
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    workers: int = FROM_RECIPE
    out: Path = FROM_RECIPE

    def __post_init__(self) -> None:
        _check_choice("model", self.model, MODELS)
        _check_choice("stem", self.stem, STEMS)
        _check_choice("dataset", self.dataset, DATASETS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("precision", self.precision, PRECISIONS)

        device = choose_device(self.device)
        filled_in = {
            "device": str(device),
            "precision": choose_precision(device) if self.precision == "auto" else self.precision,
            "data_dir": Path(self.data_dir).expanduser(),
        }
        for name, default in RECIPES[self.dataset]._asdict().items():
            filled_in[name] = default if getattr(self, name) is None else getattr(self, name)
        filled_in["workers"] = min(4, os.cpu_count() or 1) if self.workers is None else self.workers
        if self.out is None:
            filled_in["out"] = free_folder(f"{self.dataset}-{self.model}-{time.strftime('%Y%m%d-%H%M%S')}")
        else:
            filled_in["out"] = Path(self.out).expanduser()
        for name, value in filled_in.items():
            object.__setattr__(self, name, value)  # the way to set a field of a frozen dataclass

        _check_integer("epochs", self.epochs, at_least=1)
        # Batch norm cannot take statistics over a single value.
        _check_integer("batch_size", self.batch_size, at_least=2)
        _check_integer("image_size", self.image_size, at_least=8)
        _check_integer("workers", self.workers, at_least=0)
        _check_integer("seed", self.seed, at_least=0)
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {self.seed}")
        if not (_is_number(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be a positive finite number, got {self.lr!r}")
        if not (_is_number(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be a finite number, 0 or more, got {self.weight_decay!r}")
        if not (_is_number(self.momentum) and 0 <= self.momentum < 1):
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum!r}")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values that JSON and `torch.load(weights_only=True)` take."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the first GPU where there is one.

    Raises:
        ValueError: the name is not "auto", "cpu", "cuda" or "cuda:N", or there is no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"device {name!r} asks for a GPU that is not there: torch {torch.__version__} sees {count}"
            )
    return device


def choose_precision(device: torch.device) -> str:
    """Return "bf16" where the processor has instructions for it, "fp32" where bf16 would be emulated and slower."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Private, but in each torch from 2.4 on; get_capabilities(), its public successor, came after 2.11.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, probe, lambda: False)() for probe in probes) else "fp32"


def free_folder(name: str) -> Path:
    """Return runs/NAME, or NAME-2, -3 … where a run of the same second has it."""
    candidates = itertools.chain([Path("runs") / name], (Path("runs") / f"{name}-{i}" for i in itertools.count(2)))
    return next(folder for folder in candidates if not folder.exists())


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_integer(name: str, value: Any, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
