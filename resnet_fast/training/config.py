"""The settings of a training run, their defaults, and the one place where they are checked."""

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from resnet_fast.common.checks import did_you_mean, shown
from resnet_fast.data.options import DATASETS, DOWNLOADED, MAX_IMAGE_SIZE, NOT_MIRRORED
from resnet_fast.models.registry import MODELS, STEMS, check_name, check_stem
from resnet_fast.training.options import DEVICE, MAY_MOVE, NOT_NEGATIVE, STAGES, URL, integer, one_of, settings_of
from resnet_fast.training.paths import free_folder
from resnet_fast.training.recipes import (
    DEFAULT_RECIPES,
    FROM_RECIPE,
    RECIPE_FIELDS,
    RECIPES,
    Recipe,
    check_together,
)
from resnet_fast.training.torchrun import world_size

if TYPE_CHECKING:
    import torch

IMAGE_SIZE = 32
DIGITS_SIZE = 12  # with recipe digits; the cutout of other recipes is a square of 12 pixels
N_WHITENING = 54  # filters: one per value of a 3x3 patch of 3 channels, and their negatives

# Without effect, by optimizer.
_IDLE = {"sgd": ("muon_lr", "muon_momentum", "rescale_filters"), "muon": ()}
_IDLE["adam"] = (*_IDLE["sgd"], "momentum", "nesterov")

MODEL = one_of(MODELS, lambda name, value, names: check_name(value))


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """All settings of a run (docs/options.md). Every default is filled in, except for `crop`, `mirror` and `weights`.

    Raises:
        ValueError: a setting breaks its rule; the message names the rule and the value.
    """

    recipe: Annotated[
        str,
        one_of(RECIPES),
        "Defaults for the optimizer, schedule, augmentation and initialization; explicit options override them. "
        f"[default: {DEFAULT_RECIPES['cifar10']}; cifar100: {DEFAULT_RECIPES['cifar100']}; "
        "digits and folder: the recipe of that name]",
    ] = FROM_RECIPE
    model: Annotated[str, MODEL, f"The network: {', '.join(MODELS)}."] = "resnet18"
    stem: Annotated[
        str,
        one_of(STEMS),
        "First layers. cifar: 3x3 convolution, no pooling; imagenet: 7x7 convolution with stride 2, then max pooling. "
        "[default: cifar if the network has both, else the one it has]",
    ] = FROM_RECIPE
    backend: Annotated[
        str,
        one_of(("fused", "eager", "compile")),
        "fused: this library's kernels; eager: plain PyTorch, with torchvision's network if it has one; compile: eager "
        "under torch.compile.",
    ] = "fused"
    graph: Annotated[
        bool, MAY_MOVE, "Run each step as one CUDA graph. [default: on for a GPU and a single process]"
    ] = FROM_RECIPE
    dataset: Annotated[
        str,
        one_of(DATASETS),
        "cifar10, cifar100 and svhn are downloaded if missing; digits comes with the package; folder: your images, in "
        "train/ and test/ of --data-dir, a subfolder for each class.",
    ] = "cifar10"
    data_dir: Annotated[Path, MAY_MOVE, "Folder of your images, or to which data sets are downloaded."] = Path("data")
    mirror: Annotated[
        str | None,
        URL,
        MAY_MOVE,
        "URL to download from: a folder that holds the files, or the archive itself. "
        "[default: known servers, one after the other]",
    ] = None
    image_size: Annotated[
        int,
        integer(8, MAX_IMAGE_SIZE + 1),
        "Height and width to which images of digits and folder are resized, in pixels. [default: 12 for digits with "
        "recipe digits, else 32]",
    ] = FROM_RECIPE
    images: Annotated[
        str,
        one_of(("auto", "memory", "stream")),
        MAY_MOVE,
        "For dataset folder. memory: read all images once; stream: read each when needed; auto: memory if they fit.",
    ] = "auto"
    skip_unreadable: Annotated[
        bool, "For dataset folder: first read every image, then train without those that cannot be read."
    ] = False
    holdout: Annotated[
        int, integer(0), "Number of training images held out for validation; the test images are not used."
    ] = 0
    accumulate: Annotated[int, integer(1), "Micro-batches per step, computed one after the other to save memory."] = 1
    sync_bn: Annotated[bool, "Compute batch statistics over all processes; no effect with a single one."] = False
    weights: Annotated[
        Path | None,
        "Weights to start from: a run folder, a checkpoint, or a file of torchvision, timm … "
        "If the number of classes differs, the last layer starts from new weights.",
    ] = None
    new_head: Annotated[
        bool, "With weights: give the last layer new weights even if the number of classes is the same."
    ] = False
    freeze: Annotated[
        str,
        STAGES,
        "With weights: stages that are not trained, with commas between them: stem, layer1 … layer4 (CIFAR networks: "
        "… layer3; article: residual_blocks.0 … residual_blocks.7). Their batch norms use the running statistics.",
    ] = ""
    seed: Annotated[int, integer(0), "Seed of the weights, the order of the images and the augmentation."] = 0
    device: Annotated[str, DEVICE, MAY_MOVE, "Device: auto (a GPU if there is one), cpu, cuda or cuda:N."] = "auto"
    precision: Annotated[
        str,
        one_of(("auto", "fp32", "bf16", "fp16")),
        "fp32; bf16 by autocast; fp16 by autocast with loss scaling. auto: bf16 if the processor has instructions for "
        "it, fp16 on a GPU of compute capability 7.0 to 7.5 (V100, T4), else fp32.",
    ] = "auto"
    deterministic: Annotated[bool, "On a GPU, give equal results in every run, and refuse operations that cannot."] = (
        False
    )
    workers: Annotated[
        int,
        integer(0, 2**10),
        MAY_MOVE,
        "Processes that read an image folder, and as many for its test images. [default: one per CPU, at most 4]",
    ] = FROM_RECIPE
    time_budget: Annotated[
        float,
        NOT_NEGATIVE,
        MAY_MOVE,
        "Time limit of the training, such as 90 (seconds), 15m or 2h: no epoch starts that would end later, except the "
        "first. The schedule still spans all epochs. A resumed run has the full time again. [default: no limit]",
    ] = 0.0
    tensorboard: Annotated[bool, MAY_MOVE, "Also write TensorBoard events to the run folder."] = False
    wandb: Annotated[bool, MAY_MOVE, "Also report each epoch to Weights & Biases."] = False
    out: Annotated[Path, MAY_MOVE, "Run folder, new or empty. [default: runs/<dataset>-<model>-<time>]"] = FROM_RECIPE

    def __post_init__(self) -> None:
        given = {name for name in SETTINGS if getattr(self, name) is not None}
        for name in ("model", "dataset"):  # other defaults depend on these
            SETTINGS[name].check(getattr(self, name))
        self._fill_in("stem", MODELS[self.model].stems[0])
        self._fill_in("recipe", DEFAULT_RECIPES[self.dataset])
        SETTINGS["recipe"].check(self.recipe)
        recipe = RECIPES[self.recipe]
        if self.dataset in NOT_MIRRORED:
            recipe = replace(recipe, flip="none")
        for name in RECIPE_FIELDS:
            self._fill_in(name, getattr(recipe, name))
        self._fill_in("image_size", DIGITS_SIZE if self.recipe == self.dataset == "digits" else IMAGE_SIZE)
        by_device = self.graph is None
        self._fill_in("graph", False)
        self._fill_in("workers", min(4, os.cpu_count() or 1))
        self._fill_in("out", free_folder(f"{self.dataset}-{self.model}-{time.strftime('%Y%m%d-%H%M%S')}"))
        for name, setting in SETTINGS.items():
            self._set(name, setting.check(getattr(self, name)))
        self._check_combinations()
        if not given >= {*RECIPE_FIELDS} - {"crop"}:  # a saved run gives all; earlier versions accepted idle ones
            self._check_effects(given)
        self._set("device", find_device(self.device))  # may import torch, so all else is checked first
        if by_device:
            self._set("graph", self.device != "cpu" and world_size() == 1)
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
        check_together(self)
        if self.accumulate > self.batch_size // 2:
            raise ValueError(
                f"accumulate must leave 2 images in each micro-batch of a batch of {self.batch_size}, "
                f"got {self.accumulate}"
            )
        if self.ghost_batch_size == 1:
            raise ValueError("ghost_batch_size must be 0 or at least 2, got 1")
        if self.ghost_batch_size and self.backend != "fused":
            raise ValueError(f"ghost_batch_size needs backend fused, got {self.backend}")
        if self.ghost_batch_size and self.sync_bn:
            raise ValueError("ghost_batch_size and sync_bn exclude each other, got both")
        check_stem(self.model, self.stem)
        model = MODELS[self.model]
        if self.whiten and (self.stem != "cifar" or model.stem_width < N_WHITENING):
            raise ValueError(
                f"whiten needs stem cifar (3x3) with at least {N_WHITENING} filters, "
                f"got stem {self.stem} with {model.stem_width} ({self.model})"
            )
        for name, reason in model.refused.items():
            if getattr(self, name):
                raise ValueError(f"{name} must be False for {self.model}, got True: {reason}")
        for name in ("zero_gamma", "dirac", "whiten"):
            if self.weights is not None and getattr(self, name):
                raise ValueError(f"{name} must be False with weights, got True: it would overwrite some of them")
        stages = ("stem", *model.stages)
        for stage in filter(None, self.freeze.split(",")):
            if stage not in stages:
                hint = did_you_mean(stage, stages, at_most=1)
                raise ValueError(
                    f"freeze must name stages of {self.model}, {', '.join(stages)}, got {shown(stage)}{hint}"
                )
        if self.optimizer == "muon" and {*model.stages} <= self._frozen():
            raise ValueError(f"optimizer muon needs a stage to train after the stem, got freeze {self.freeze}")
        for name in ("new_head", "freeze"):
            if getattr(self, name) and self.weights is None:
                raise ValueError(
                    f"{name} needs weights to start from, got weights None and {name} {getattr(self, name)}"
                )
        if self.graph and world_size() > 1:
            raise ValueError(f"graph needs a single process, got {world_size()}")
        if self.images != "auto" and self.dataset != "folder":
            raise ValueError(f"images {self.images} needs dataset folder, got {self.dataset}")
        if self.mirror is not None and self.dataset not in DOWNLOADED:
            raise ValueError(f"mirror needs a dataset of {', '.join(DOWNLOADED)}, got {self.dataset}")
        if self.skip_unreadable and self.dataset != "folder":
            raise ValueError(f"skip_unreadable needs dataset folder, got {self.dataset}")

    def _check_effects(self, given: set[str]) -> None:
        """Raise ValueError if a given setting would have no effect; a recipe's own may."""
        for name in _IDLE[self.optimizer]:
            if name in given and getattr(self, name):
                possible = [optimizer for optimizer, idle in _IDLE.items() if name not in idle]
                needed = f"{name} {getattr(self, name)} needs optimizer {' or '.join(possible)}"
                raise ValueError(f"{needed}, got {self.optimizer}")
        if self.image_size != IMAGE_SIZE and self.dataset in DOWNLOADED:
            raise ValueError(f"image_size {self.image_size} needs dataset digits or folder, got {self.dataset}")
        if "body_lr" in given and self.body_lr != 1 and {"stem", *MODELS[self.model].stages} <= self._frozen():
            raise ValueError(f"body_lr {self.body_lr:g} needs a stage to train, got freeze {self.freeze}")

    def _frozen(self) -> set[str]:
        return set(filter(None, self.freeze.split(",")))

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, which JSON and `torch.load(weights_only=True)` accept.

        The path of `weights` is absolute, because a run may be resumed in another working directory.
        """
        values = asdict(self)
        if self.weights is not None:
            values["weights"] = self.weights.absolute()
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


SETTINGS = settings_of(TrainConfig)
MOVABLE = tuple(name for name, setting in SETTINGS.items() if setting.may_move)


def choose_device(name: "str | torch.device") -> "torch.device":
    """Return the device named `name`: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one, else a CPU.

    Raises:
        ValueError: the name is none of these, or there is no such GPU.
    """
    resolved = find_device(name)
    import torch

    return torch.device(resolved)


def find_device(name: object) -> str:
    """Return the name of the device that `choose_device` returns; import torch only if needed."""
    text = SETTINGS["device"].check(name)
    if text == "cpu":
        return text
    import torch

    has_gpu = torch.cuda.is_available()
    if text == "auto":
        return "cuda" if has_gpu else "cpu"
    count = torch.cuda.device_count() if has_gpu else 0
    if int(text.partition(":")[2] or 0) >= count:
        raise ValueError(f"device must be a GPU that is there, got '{text}': torch {torch.__version__} finds {count}")
    return text


def check_device(device: Any) -> "torch.device":
    """Return `device` as a torch.device; raise ValueError if it does not exist."""
    import torch

    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"device must be a torch device, got {shown(device)}") from None
    return choose_device(checked) if checked.type == "cuda" else checked


def choose_precision(device: "torch.device | str") -> str:
    """Return the precision that "auto" stands for: the fastest that the processor computes in without emulation.

    On a GPU, the compute capability decides: "bf16" from 8.0 on, "fp16" from 7.0 to 7.5 (V100, T4), else "fp32". On a
    CPU, it is "bf16" with AVX512-BF16 or AMX, else "fp32".

    Raises:
        ValueError: torch does not know the device, or there is no such GPU.
    """
    import torch

    device = check_device(device)
    if device.type == "cuda":
        # By default torch.cuda.is_bf16_supported() is True even if bf16 is emulated.
        major, _ = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
    # Private, but in every torch from 2.4 on; get_capabilities(), the public successor, came after 2.11.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, probe, lambda: False)() for probe in probes) else "fp32"
