"""Recipes: the settings that decide what is learned, as opposed to where it is computed and on which data.

    RECIPES["fast94"].epochs
    dataclasses.replace(RECIPES["fast94"], cutout=0)    # an ablation

baseline   200 epochs, cosine, batch 128: the usual training of this network (kuangliu/pytorch-cifar)
fast94     26 epochs, batch 512. The original, with batch 500, reaches 93.4 %, and 94.0 % with flip TTA
           (KellerJordan/cifar10-zoo at d5a9ca5, airbench/baselines/train_resnet18_94.py)
fast95     fast94 with 80 epochs. The original reaches 95.4 %, and 95.88 % with flip TTA (train_resnet18_96.py)
faster94   12 epochs with whitening, identity initialization, a higher rate of batch-norm biases, Lookahead, Muon and
           label smoothing, as in airbench94_muon (KellerJordan/cifar10-airbench). Not measured yet. 12 is a guess:
           fast94's epochs times 37 / 80, the epochs that airbench96's network and this one need for 96 %
faster95   faster94 with 37 epochs and airbench96's crop and cutout. Not measured yet
folder     30 epochs, one-cycle, batch 128: for images of any kind
article    Adam at a constant rate, no augmentation, as in an introduction to skip connections
digits     3 epochs, batch 24, for UCI's digits at 12x12: a minute on a CPU

The accuracies are published results of the named programs on CIFAR-10.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any

from resnet_fast.data.options import FLIPS, PADDINGS
from resnet_fast.training.options import (
    ALPHA,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SHARE,
    SIZES,
    integer,
    one_of,
    settings_of,
)
from resnet_fast.training.schedule import SCHEDULES

# Typed as Any, so that a field is declared as `int` although its default is only filled in by TrainConfig.
FROM_RECIPE: Any = None


@dataclass(frozen=True)
class Recipe:
    """The settings that decide what is learned and how; docs/options.md lists them."""

    epochs: Annotated[int, integer(1), "Passes over the training images."] = FROM_RECIPE
    # Batch norm cannot compute statistics of a single value.
    batch_size: Annotated[int, integer(2), "Images per step, over all processes."] = FROM_RECIPE
    optimizer: Annotated[
        str,
        one_of(("sgd", "adam", "muon")),
        "SGD, Adam, or Muon for every convolution except the first and SGD for all else.",
    ] = FROM_RECIPE
    lr: Annotated[float, POSITIVE, "Peak learning rate."] = FROM_RECIPE
    schedule: Annotated[str, one_of(SCHEDULES), "Shape of the learning rate over the run."] = FROM_RECIPE
    momentum: Annotated[float, FRACTION, "Momentum of SGD."] = FROM_RECIPE
    nesterov: Annotated[bool, "Use Nesterov momentum, also in Muon; no effect on SGD if momentum is 0."] = FROM_RECIPE
    weight_decay: Annotated[float, NOT_NEGATIVE, "Weight decay of all parameters."] = FROM_RECIPE
    bn_bias_lr: Annotated[
        float,
        POSITIVE,
        "Learning rate of batch norm biases, as a multiple of lr; their weight decay is divided by the same number.",
    ] = FROM_RECIPE
    body_lr: Annotated[
        float, POSITIVE, "Learning rate of all layers except the last, as a multiple of lr; below 1 for fine-tuning."
    ] = FROM_RECIPE
    muon_lr: Annotated[float, POSITIVE, "Peak learning rate of the weights that Muon trains."] = FROM_RECIPE
    muon_momentum: Annotated[float, FRACTION, "Momentum of Muon."] = FROM_RECIPE
    rescale_filters: Annotated[
        bool,
        "Rescale each weight that Muon trains to norm √C_out before every step; for networks with a batch norm after "
        "each convolution, which cancels the scale of a weight.",
    ] = FROM_RECIPE
    label_smoothing: Annotated[
        float, FRACTION, "Share of the target spread evenly over all classes (Szegedy et al. 2016, arXiv:1512.00567)."
    ] = FROM_RECIPE
    clip_norm: Annotated[float, NOT_NEGATIVE, "Maximum L2 norm of all gradients together; 0: no limit."] = FROM_RECIPE
    crop: Annotated[
        int | None,
        integer(0),
        "Maximum shift of a random crop, in pixels; 0: no crop. "
        "[default: 4 for CIFAR and SVHN, 1/16 of the image size for digits, 1/8 for folder; recipe article: 0; recipe "
        "faster94: 2]",
    ] = FROM_RECIPE
    padding: Annotated[
        str, one_of(PADDINGS), "Pixels that a crop shows beyond the edge: black (zero) or mirrored (reflect)."
    ] = FROM_RECIPE
    flip: Annotated[
        str,
        one_of(FLIPS),
        "Mirror half of the images: chosen at random in each epoch, or alternating from epoch to epoch. Off by default "
        "for svhn and digits.",
    ] = FROM_RECIPE
    cutout: Annotated[int, integer(0), "Side of a random square set to the mean color, in pixels; 0: off."] = (
        FROM_RECIPE
    )
    trivial_augment: Annotated[
        bool,
        "Apply one random operation to each image: shear, shift, rotation, color … (TrivialAugment Wide, Müller and "
        "Hutter 2021, arXiv:2103.10158).",
    ] = FROM_RECIPE
    random_erasing: Annotated[
        float,
        PROBABILITY,
        "Probability that a random rectangle, 2 to 33 % of the image, is set to the mean color (Zhong et al. 2017, "
        "arXiv:1708.04896).",
    ] = FROM_RECIPE
    mixup: Annotated[
        float,
        ALPHA,
        "Mix pairs of images and their labels, with shares drawn from Beta(mixup, mixup); 0: off (Zhang et al. 2018, "
        "arXiv:1710.09412).",
    ] = FROM_RECIPE
    cutmix: Annotated[
        float,
        ALPHA,
        "Replace a rectangle of each image, and that share of its label, by another image's; shares are drawn from "
        "Beta(cutmix, cutmix); 0: off. With mixup on, each batch uses one of the two (Yun et al. 2019, "
        "arXiv:1905.04899).",
    ] = FROM_RECIPE
    normalize: Annotated[
        str, one_of(("dataset", "half")), "Mean and std that normalize the images: the training images', or 0.5."
    ] = FROM_RECIPE
    ema: Annotated[
        float, FRACTION, "Decay per step of a moving average of the weights, which is tested and saved; 0: off."
    ] = FROM_RECIPE
    lookahead: Annotated[
        bool,
        "Average the weights every 5 steps, with a growing decay, and continue from the average (Jordan 2024, "
        "arXiv:2404.00498). Excludes ema.",
    ] = FROM_RECIPE
    bn_momentum: Annotated[
        float, SHARE, "Share of the newest batch in batch norm's running statistics; about 0.4 with lookahead."
    ] = FROM_RECIPE
    sizes: Annotated[
        str,
        SIZES,
        "Image sizes to train on, ascending, such as 16,24,32; each for an equal share of the steps. The last one must "
        "be the full size. [default: the full size only]",
    ] = FROM_RECIPE
    zero_gamma: Annotated[
        bool,
        "Initialize the weight of the last batch norm of each residual block to 0 (Goyal et al. 2017, "
        "arXiv:1706.02677).",
    ] = FROM_RECIPE
    dirac: Annotated[
        bool,
        "Initialize 3x3 convolutions as the identity on their first channels (Zagoruyko and Komodakis 2017, "
        "arXiv:1706.00388; Jordan 2024, arXiv:2404.00498).",
    ] = FROM_RECIPE
    whiten: Annotated[
        bool,
        "Initialize the stem to whiten the patches of the training images (Page 2019, How to train your ResNet 8; "
        "Jordan 2024); training then changes it. Needs a 3x3 stem with at least 54 filters.",
    ] = FROM_RECIPE
    ghost_batch_size: Annotated[
        int,
        integer(0),
        "Number of images over which a batch norm computes its statistics; 0: the whole batch of a process.",
    ] = FROM_RECIPE


RECIPE_FIELDS = tuple(settings_of(Recipe))

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
    body_lr=1.0,
    # airbench94_muon uses 0.24 at batch 2000; this is 0.24·√(512 / 2000).
    muon_lr=0.12,
    muon_momentum=0.6,
    rescale_filters=False,
    label_smoothing=0.0,
    clip_norm=0.0,
    crop=None,
    padding="zero",
    flip="random",
    cutout=0,
    trivial_augment=False,
    random_erasing=0.0,
    mixup=0.0,
    cutmix=0.0,
    normalize="dataset",
    ema=0.0,
    lookahead=False,
    bn_momentum=0.1,
    sizes="",
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
_FASTER = replace(
    _FAST,
    epochs=12,
    optimizer="muon",
    schedule="linear",
    bn_bias_lr=64.0,
    rescale_filters=True,
    label_smoothing=0.2,
    crop=2,
    cutout=0,
    lookahead=True,
    bn_momentum=0.4,
    dirac=True,
    whiten=True,
)

RECIPES = {
    "baseline": _BASELINE,
    "fast94": replace(_FAST, epochs=26),
    "fast95": replace(_FAST, epochs=80),
    "faster94": _FASTER,
    "faster95": replace(_FASTER, epochs=37, crop=None, cutout=12),
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
    "digits": replace(_BASELINE, epochs=3, batch_size=24, lr=0.0125, schedule="triangular", nesterov=True, flip="none"),
}
# Published for ResNet-18 on CIFAR-100, with `baseline` except for the schedule (x0.2 at epochs 60, 120 and 160): 75.6 %
# (weiaicunzai/pytorch-cifar100) and, with Nesterov momentum, 77.5 % (DeVries and Taylor 2017, arXiv:1708.04552). No
# published recipe of this network for SVHN is known; `fast94` has the fewest epochs of its published recipes.
DEFAULT_RECIPES = {
    "cifar10": "fast94",
    "cifar100": "baseline",
    "svhn": "fast94",
    "digits": "digits",
    "folder": "folder",
}


def check_together(recipe: Recipe) -> None:
    """Raise ValueError if two settings exclude each other."""
    if recipe.lookahead and recipe.ema:
        raise ValueError(f"lookahead and ema exclude each other: both average the weights, got ema {recipe.ema:g}")
