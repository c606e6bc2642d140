"""What a training run is: every setting, its default, and the one place where settings are checked."""

import os
import re
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_fast.checks import check_choice, check_integer, check_path, is_number, shown
from resnet_fast.data.options import DATASETS, FLIPS, MAX_IMAGE_SIZE, PADDINGS
from resnet_fast.models.registry import MODELS, check_name, check_stem
from resnet_fast.training.paths import free_folder
from resnet_fast.training.recipes import DEFAULT_RECIPES, FROM_RECIPE, RECIPE_FIELDS, RECIPES, Recipe
from resnet_fast.training.schedule import SCHEDULES
from resnet_fast.training.torchrun import world_size

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "fp32", "bf16")
BACKENDS = ("fused", "eager", "compile")
IMAGES = ("auto", "memory", "stream")
OPTIMIZERS = ("sgd", "adam")
NORMALIZATIONS = ("dataset", "half")
NOT_MIRRORED = ("digits",)  # a mirrored 2 is no 2
N_WHITENING = 54  # filters: 27 directions of 3x3 pixels of 3 channels, and their negatives
CHOICES = {
    "backend": BACKENDS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "padding": PADDINGS,
    "flip": FLIPS,
    "normalize": NORMALIZATIONS,
    "images": IMAGES,
    "precision": PRECISIONS,
}
INTEGERS = {  # the least, and the first that is too large
    "epochs": (1, 2**32),
    "batch_size": (2, 2**32),  # batch norm cannot take statistics over a single value
    "crop": (0, 2**32),
    "cutout": (0, 2**32),
    "ghost_batch_size": (0, 2**32),
    "image_size": (8, MAX_IMAGE_SIZE + 1),
    "holdout": (0, 2**32),
    "accumulate": (1, 2**32),
    "workers": (0, 2**10),
    "seed": (0, 2**32),
}
POSITIVE = ("a positive finite number", lambda value: value > 0)
NOT_NEGATIVE = ("a finite number, 0 or more", lambda value: value >= 0)
FRACTION = ("in [0, 1)", lambda value: 0 <= value < 1)
NUMBERS = {
    "lr": POSITIVE,
    "bn_bias_lr": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "clip_norm": NOT_NEGATIVE,
    "time_budget": NOT_NEGATIVE,
    "momentum": FRACTION,
    "ema": FRACTION,
    "label_smoothing": FRACTION,
}
SWITCHES = (
    "nesterov",
    "zero_gamma",
    "dirac",
    "whiten",
    "graph",
    "sync_bn",
    "deterministic",
    "tensorboard",
    "skip_unreadable",
)
# Where a run goes on, not what it computes: these may be others than before.
MOVABLE = ("device", "data_dir", "workers", "images", "graph", "time_budget", "tensorboard", "out")


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """All settings of a run. Once made, every field but `crop` and `weights` holds the value that will be used.

    Args:
        recipe: a name in RECIPES; None: see DEFAULT_RECIPES. It gives the settings that `Recipe` lists, each of which
            may be given beside it.
        model: a name in MODELS, as resnet_fast.models.list_models() gives them.
        stem: "cifar" (3x3, no pooling) or "imagenet" (7x7 stride 2 and max-pooling), of those that the model has; None:
            "cifar" where it has both.
        backend: "fused", "eager" (the network of plain PyTorch; of torchvision, where it is there) or "compile" (that
            under torch.compile).
        graph: run the step as a CUDA graph; None: on a GPU, if it is one process.
        dataset: "cifar10", "digits" or "folder".
        data_dir: where CIFAR-10 lies or is downloaded to, or the folder with train/ and test/.
        image_size: pixels to which the images of "folder" are resized, 8 … 1024.
        images: of "folder": "memory", "stream" or "auto" (resnet_fast.data.Split.to).
        skip_unreadable: of "folder": leave out images that cannot be read, instead of raising an error.
        holdout: so many of the training images are validated on instead of the test images; 0: test.
        accumulate: parts in which a batch is computed one after the other, for less memory.
        sync_bn: on several processes, batch statistics over all of them.
        weights: where the first weights are from: a run folder, or a file that resnet_fast.load_checkpoint reads. With
            another number of classes the last layer is new. None: all are new.
        seed: of the initial weights, the order of the images and the augmentation.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "fp32", "bf16" (autocast, weights in fp32) or "auto": bf16 where the processor computes in it.
        deterministic: refuse what two runs on a GPU might compute differently.
        workers: processes that read the images of "folder"; None: one per processor, at most 4.
        time_budget: seconds; no epoch begins that, as long as the last one with its evaluation and files, would end
            later; 0 for no limit. The schedule stays that of all epochs. A run that is resumed has as many seconds
            again, and at least one epoch.
        tensorboard: write TensorBoard events to the run folder, too.
        out: the run folder; None: runs/<dataset>-<model>-<time>.

    Raises:
        ValueError: a setting breaks its rule; the message names the rule and the value.
    """

    recipe: str = FROM_RECIPE
    model: str = "resnet18"
    stem: str = FROM_RECIPE
    backend: str = "fused"
    graph: bool = FROM_RECIPE
    dataset: str = "cifar10"
    data_dir: Path = Path("data")
    image_size: int = 32
    images: str = "auto"
    skip_unreadable: bool = False
    holdout: int = 0
    accumulate: int = 1
    sync_bn: bool = False
    weights: Path | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    deterministic: bool = False
    workers: int = FROM_RECIPE
    time_budget: float = 0.0
    tensorboard: bool = False
    out: Path = FROM_RECIPE

    def __post_init__(self) -> None:
        check_name(self.model)
        self._fill_in("stem", MODELS[self.model].stems[0])
        check_choice("dataset", self.dataset, DATASETS)
        recipe_name = DEFAULT_RECIPES[self.dataset] if self.recipe is None else self.recipe
        check_choice("recipe", recipe_name, RECIPES)
        recipe = RECIPES[recipe_name]
        if self.dataset in NOT_MIRRORED:
            recipe = replace(recipe, flip="none")
        for name in RECIPE_FIELDS:
            self._fill_in(name, getattr(recipe, name))
        self._fill_in("recipe", recipe_name)
        self._fill_in("workers", min(4, os.cpu_count() or 1))
        self._fill_in("out", free_folder(f"{self.dataset}-{self.model}-{time.strftime('%Y%m%d-%H%M%S')}"))
        for name in ("data_dir", "out") if self.weights is None else ("data_dir", "out", "weights"):
            self._set(name, check_path(name, getattr(self, name)))
        # Plain values: a checkpoint with strings or numbers of numpy could not be read again.
        strings = {name: str.__str__(value) for name, value in vars(self).items() if isinstance(value, str)}
        for name, value in {**strings, **check_fields(self)}.items():
            self._set(name, value)
        self._check_combinations()
        self._set("device", find_device(self.device))  # may import torch, so all else is checked before
        self._fill_in("graph", self.device != "cpu" and world_size() == 1)
        if self.graph and self.device == "cpu":
            raise ValueError("graph needs a CUDA device, got cpu")
        if self.sync_bn and self.backend != "fused" and self.device == "cpu":
            raise ValueError(f"sync_bn with backend {self.backend} needs GPUs: torch's SyncBatchNorm has no CPU kernel")
        if self.precision == "auto":
            self._set("precision", choose_precision(self.device))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the way to set a field of a frozen dataclass

    def _fill_in(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            self._set(name, value)

    def _check_combinations(self) -> None:
        if self.accumulate > self.batch_size // 2:
            raise ValueError(
                f"accumulate must leave 2 images to each part of a batch of {self.batch_size}, got {self.accumulate}"
            )
        if self.ghost_batch_size == 1:
            raise ValueError("ghost_batch_size must be 0 or at least 2, got 1")
        if self.ghost_batch_size and self.backend != "fused":
            raise ValueError(f"ghost_batch_size needs backend fused, got {self.backend}")
        if self.ghost_batch_size and self.sync_bn:
            raise ValueError("ghost_batch_size and sync_bn exclude each other: groups of images, or all processes'")
        check_stem(self.model, self.stem)
        model = MODELS[self.model]
        if self.whiten and (self.stem != "cifar" or model.stem_width < N_WHITENING):
            raise ValueError(
                f"whiten needs a 3x3 stem, stem cifar, of {N_WHITENING} filters or more, "
                f"got {self.stem} of {model.stem_width}"
            )
        for name, reason in model.refused.items():
            if getattr(self, name):
                raise ValueError(f"{name} must be False for {self.model}, got True: {reason}")
        for name in ("zero_gamma", "dirac", "whiten"):
            if self.weights is not None and getattr(self, name):
                raise ValueError(f"{name} must be False with weights, got True: it would overwrite some of them")
        if self.graph and world_size() > 1:
            raise ValueError(f"graph needs a single process, got {world_size()}")
        if self.images != "auto" and self.dataset != "folder":
            raise ValueError(f"images {self.images} is for dataset folder, {self.dataset} is always in memory")
        if self.skip_unreadable and self.dataset != "folder":
            raise ValueError(f"skip_unreadable is for dataset folder, got {self.dataset}")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values that JSON and `torch.load(weights_only=True)` take."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def check_fields(settings: Recipe) -> dict[str, Any]:
    """Check the numbers, choices and switches of a recipe, or of all settings; return the numbers as Python's own.

    Raises:
        ValueError: one breaks its rule.
    """
    plain: dict[str, Any] = {}
    for name in (field.name for field in fields(settings)):
        value = getattr(settings, name)
        if name in ("crop", "graph") and value is None:  # the data set and the device say
            continue
        if name in CHOICES:
            check_choice(name, value, CHOICES[name])
        elif name in INTEGERS:
            plain[name] = check_integer(name, value, *INTEGERS[name])
        elif name in NUMBERS:
            rule, is_kept = NUMBERS[name]
            if not (is_number(value) and is_kept(value)):
                raise ValueError(f"{name} must be {rule}, got {shown(value)}")
            plain[name] = float(value)
        elif name in SWITCHES and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return plain


def choose_device(name: "str | torch.device") -> "torch.device":
    """Return the device called `name`; "auto" is the first GPU where there is one.

    Raises:
        ValueError: the name is not "auto", "cpu", "cuda" or "cuda:N", or there is no such GPU.
    """
    found = find_device(name)
    import torch

    return torch.device(found)


def find_device(name: object) -> str:
    """Return the name of the device that `choose_device` returns; torch is imported where only it can tell."""
    text = name if isinstance(name, str) else str(name) if type(name).__module__ == "torch" else ""
    if not re.fullmatch("auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?", text):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {shown(name)}")
    if text == "cpu":
        return text
    import torch

    has_gpu = torch.cuda.is_available()
    if text == "auto":
        return "cuda" if has_gpu else "cpu"
    count = torch.cuda.device_count() if has_gpu else 0
    if int(text.partition(":")[2] or 0) >= count:
        raise ValueError(f"device '{text}' asks for a GPU that is not there: torch {torch.__version__} sees {count}")
    return text


def check_device(device: Any) -> "torch.device":
    """Return torch's device of that name; raise ValueError if there is none."""
    import torch

    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"device must be a device of torch, got {shown(device)}") from None
    return choose_device(found) if found.type == "cuda" else found


def choose_precision(device: "torch.device | str") -> str:
    """Return "bf16" where the processor has instructions for it, "fp32" where bf16 would be emulated and slower."""
    import torch

    device = check_device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Private, but in each torch from 2.4 on; get_capabilities(), its public successor, came after 2.11.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, probe, lambda: False)() for probe in probes) else "fp32"
