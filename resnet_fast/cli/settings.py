"""The options of `resnet-fast train`: one for each field of TrainConfig, made of what is said there."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from resnet_fast.cli.app import choices
from resnet_fast.training.config import SETTINGS
from resnet_fast.training.options import Setting
from resnet_fast.training.recipes import RECIPE_FIELDS, RECIPES

<<<<<<< HEAD
NAMES = (*(name for name in SETTINGS if name not in RECIPE_FIELDS), *RECIPE_FIELDS)  # the recipe before what it gives
=======
MODEL_HELP = f"The network: {', '.join(MODELS)}."
STEM_HELP = (
    "cifar: 3x3, no pooling; imagenet: 7x7 stride 2, then pooling. "
    "[default: cifar, where a network has both; others have one]"
)
HELP = {
    "recipe": "What is learned, and how: gives all settings below, each of which may be given beside it. "
    f"[default: {DEFAULT_RECIPES['cifar10']}; for digits and folder those of their names]",
    "model": MODEL_HELP,
    "stem": STEM_HELP,
    "backend": "fused: this library; eager: plain PyTorch, torchvision's network where it has one; compile: that under "
    "torch.compile.",
    "graph": "Run a step as one CUDA graph. [default: on a GPU, with one process]",
    "dataset": "cifar10 downloads itself; digits needs no network; folder is --data-dir with train/ and test/.",
    "data_dir": "Where CIFAR-10 is or goes to, or the folder of images.",
    "image_size": "Pixels to which digits and the images of a folder are resized.",
    "images": "Of a folder: memory reads all of them once, stream each when it is needed; auto: memory if they fit.",
    "skip_unreadable": "Of a folder: read every image once, and train without those that cannot be read.",
    "holdout": "Validate on so many of the training images, and leave the test images alone.",
    "accumulate": "Parts in which a batch is computed one after the other, for less memory.",
    "sync_bn": "On several processes, batch statistics over all of them.",
    "weights": "Start from these weights: a run folder, a checkpoint, or a file of torchvision, timm … "
    "With another number of classes the last layer is new.",
    "seed": "Of weights, order and augmentation.",
    "device": "auto, cpu, cuda or cuda:N.",
    "precision": "auto: bf16 where the processor computes in it.",
    "deterministic": "Refuse what two runs on a GPU might compute differently.",
    "workers": "Processes reading a folder. [default: one per processor, at most 4]",
    "time_budget": "No epoch begins that would end later: 90, 15m, 2h. The schedule stays that of all epochs.",
    "tensorboard": "Write TensorBoard events to the run folder, too.",
    "out": "Run folder, new or empty. [default: runs/<dataset>-<model>-<time>]",
    "epochs": "Passes over the training images.",
    "batch_size": "Images of a step, of all processes together.",
    "optimizer": "SGD or Adam.",
    "lr": "Peak learning rate.",
    "schedule": "How the rate moves.",
    "momentum": "Of SGD.",
    "nesterov": "Nesterov's momentum.",
    "weight_decay": "Of every parameter.",
    "bn_bias_lr": "Learning rate of the batch norms' biases, in units of --lr.",
    "label_smoothing": "Share of the target that all classes get.",
    "clip_norm": "The most that the gradients' common norm may be; 0: no limit.",
    "crop": "Pixels that a random crop may reach beyond each edge. "
    "[default: 4 for CIFAR-10, a sixteenth of the size for digits, an eighth of the size for a folder; article: 0]",
    "padding": "What a crop sees beyond the edge.",
    "flip": "Mirror half of the images: each time anew, or in turns. Recipes do not mirror digits.",
    "cutout": "Side of the square that is cut out, in pixels; 0: none.",
    "normalize": "By mean and std of the training images, or by 0.5.",
    "ema": "Decay per step of the weights' moving average, which is tested and saved then; 0: none.",
    "zero_gamma": "Start the last batch norm of a block at 0, where a shortcut leads past it.",
    "dirac": "Start 3x3 convolutions as the identity.",
    "whiten": "Start the stem, if it is 3x3 with 54 filters or more, with the whitening of the images' patches.",
    "ghost_batch_size": "Images whose statistics a batch norm takes together; 0: the whole batch.",
}
>>>>>>> b60ca5e (The digits come with the package, in any image size)


def parse_seconds(text: str) -> float:
    """Return "90", "90s", "15m" or "2h" in seconds.

    Raises:
        ValueError: it is none of these, or not above 0.
    """
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"time_budget must be a time such as 90, 15m or 2h, got {text!r}")
    return seconds


def _by_recipe(name: str) -> str:
    """Return "fast94: 26, fast95: 80, …": what differs from one recipe to the other, or the one value."""
    values = {recipe: getattr(settings, name) for recipe, settings in RECIPES.items()}
    if len(set(values.values())) == 1:
        return f"[default: {_shown(next(iter(values.values())))}]"
    return f"[{', '.join(f'{recipe}: {_shown(value)}' for recipe, value in values.items())}]"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def describe(setting: Setting) -> str:
    """Return the help of a setting, and its default."""
    if "[default" in setting.help or setting.name not in RECIPE_FIELDS and setting.kind is bool:
        return setting.help
    if setting.name in RECIPE_FIELDS:
        return f"{setting.help} {_by_recipe(setting.name)}"
    if setting.default is None or setting.name == "time_budget":
        return setting.help
    return f"{setting.help} [default: {_shown(setting.default)}]"


def option(name: str, text: str | None = None) -> Any:
    """Return typer's option for a setting; `text` replaces its help."""
    setting = SETTINGS[name]
    # The networks are too many for the left column.
    metavar = {"model": "NAME", "weights": "RUN|FILE"}.get(name) or choices(setting.rule.names) or None
    flag = f"{setting.flag}/--no-{setting.flag[2:]}" if setting.kind is bool else setting.flag
    return typer.Option(flag, help=describe(setting) if text is None else text, metavar=metavar, show_default=False)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, which takes them as `**settings`, an option for every setting; None: it is not given."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    for name in NAMES:
        kind: Any = str if name == "time_budget" else SETTINGS[name].kind
        hint = Annotated[kind | None, option(name)]
        own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
    command.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in own}
    return command
