"""Recipes: everything that decides what is learned, as opposed to where and on what.

    RECIPES["fast94"].epochs
    dataclasses.replace(RECIPES["fast94"], cutout=0)    # an ablation

baseline   200 epochs, cosine, batch 128: how this network is usually trained (kuangliu/pytorch-cifar)
fast94     26 epochs, batch 512. The recipe that it begins from, with batch 500, gives 93.4 %, and 94.0 % with flip TTA
           (KellerJordan/cifar10-zoo at d5a9ca5, airbench/baselines/train_resnet18_94.py)
fast95     80 epochs of the same; there 95.4 %, and 95.88 % with flip TTA (train_resnet18_96.py)
folder     30 epochs, one-cycle, batch 128: for images of which nothing is known
article    Adam at a constant rate, no augmentation, as in an introduction to skip connections
digits     for the digits that scikit-learn carries: a minute and a half on a CPU

The accuracies are those that others published for CIFAR-10, of their programs.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

# Any, so that a field may be `int` to those who read it although TrainConfig fills in its default.
FROM_RECIPE: Any = None


@dataclass(frozen=True)
class Recipe:
    """What is learned, and how.

    Args:
        epochs: passes over the training images.
        batch_size: images of a step, of all processes together.
        optimizer: "sgd" or "adam".
        lr: the peak of the schedule.
        schedule: "one-cycle", "triangular", "cosine", "steps" or "constant".
        momentum: of SGD.
        nesterov: whether it is Nesterov's; nothing without momentum.
        weight_decay: of every parameter.
        bn_bias_lr: learning rate of the batch norms' biases, in units of lr (their weight decay is divided by it).
        label_smoothing: share of the target that is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567).
        clip_norm: the most that the gradients' common L2 norm may be; 0 for no limit.
        crop: pixels that a random crop may reach beyond each edge; None: as the data set says.
        padding: what it sees there: "zero" or "reflect".
        flip: "none", "random" or "alternating"; of a recipe, it holds where a mirrored image still shows its class.
        cutout: side of the square that is set to the mean color, in pixels; 0 for none.
        normalize: "dataset" (mean and std of the training images) or "half" (0.5 and 0.5).
        ema: decay per step of the weights' moving average, which is tested and saved then; 0 for none.
        zero_gamma: start every block's last batch norm at weight 0 (Goyal et al. 2017, arXiv:1706.02677).
        dirac: start 3x3 convolutions as the identity on their first channels (Zagoruyko and Komodakis 2017,
            arXiv:1706.00388; Jordan 2024, arXiv:2404.00498).
        whiten: start the 3x3 stem with the whitening of the training images' patches (Page 2019, How to train your
            ResNet 8; Jordan 2024). It is trained on.
        ghost_batch_size: images whose statistics a batch norm takes together; 0 for the whole batch (of a process).
    """

    epochs: int = FROM_RECIPE
    batch_size: int = FROM_RECIPE
    optimizer: str = FROM_RECIPE
    lr: float = FROM_RECIPE
    schedule: str = FROM_RECIPE
    momentum: float = FROM_RECIPE
    nesterov: bool = FROM_RECIPE
    weight_decay: float = FROM_RECIPE
    bn_bias_lr: float = FROM_RECIPE
    label_smoothing: float = FROM_RECIPE
    clip_norm: float = FROM_RECIPE
    crop: int | None = FROM_RECIPE
    padding: str = FROM_RECIPE
    flip: str = FROM_RECIPE
    cutout: int = FROM_RECIPE
    normalize: str = FROM_RECIPE
    ema: float = FROM_RECIPE
    zero_gamma: bool = FROM_RECIPE
    dirac: bool = FROM_RECIPE
    whiten: bool = FROM_RECIPE
    ghost_batch_size: int = FROM_RECIPE


RECIPE_FIELDS = tuple(field.name for field in fields(Recipe))

_BASELINE = Recipe(
    epochs=200,
    batch_size=128,
    optimizer="sgd",
    lr=0.1,
    schedule="cosine",
    momentum=0.9,
    nesterov=False,
    weight_decay=5e-4,
    bn_bias_lr=1.0,
    label_smoothing=0.0,
    clip_norm=0.0,
    crop=None,
    padding="zero",
    flip="random",
    cutout=0,
    normalize="dataset",
    ema=0.0,
    zero_gamma=False,
    dirac=False,
    whiten=False,
    ghost_batch_size=0,
)
_FAST = replace(
    _BASELINE,
    batch_size=512,
    lr=0.2,
    schedule="triangular",
    nesterov=True,
    padding="reflect",
    flip="alternating",
    cutout=12,
)

RECIPES = {
    "baseline": _BASELINE,
    "fast94": replace(_FAST, epochs=26),
    "fast95": replace(_FAST, epochs=80),
    "article": replace(
        _BASELINE,
        epochs=50,
        batch_size=32,
        optimizer="adam",
        lr=1e-3,
        schedule="constant",
        momentum=0.0,
        weight_decay=0.0,
        crop=0,
        flip="none",
        normalize="half",
    ),
    "folder": replace(_BASELINE, epochs=30, schedule="one-cycle", nesterov=True),
    "digits": replace(_BASELINE, epochs=6, batch_size=32, schedule="one-cycle", nesterov=True),
}
DEFAULT_RECIPES = {"cifar10": "fast94", "digits": "digits", "folder": "folder"}
