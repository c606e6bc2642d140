"""Settings of the study of skip connections: a small one for a CPU, and the paper's.

small_study()   digits of 16x16 pixels, 8 channels, 12 epochs: less than three minutes on two cores
full_study()    CIFAR-10, 16 channels, He et al. 2015 (arXiv:1512.03385), section 4.2
"""

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from resnet_fast.common.checks import check_integer
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.paths import free_folder
from resnet_fast.training.torchrun import world_size

if TYPE_CHECKING:
    from resnet_fast.data import ImageDataset, TensorSplit
    from resnet_fast.models import CifarResNet

N_SEEDS = (1, 1001)  # minimum, and exclusive maximum
# The paper's settings; the small study differs only as needed.
PAPER: dict[str, Any] = {
    "recipe": "baseline",
    "batch_size": 128,
    "lr": 0.1,
    "schedule": "steps",
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "precision": "fp32",
}
FULL = {**PAPER, "dataset": "cifar10", "epochs": 164}  # of 391 steps: 64,124 iterations, the paper's 64k
# No crop, so that the training error is that of the original images; small batches, for more steps per epoch. Learning
# rate and schedule were chosen so that ResNet-56 trains in few epochs; docs/depth.md lists the settings tried.
SMALL = {
    **PAPER,
    "dataset": "digits",
    "epochs": 12,
    "batch_size": 64,
    "lr": 0.05,
    "schedule": "one-cycle",
    "crop": 0,
}


@dataclass(frozen=True)
class Network:
    """One of the networks compared, named as in the paper: plain-20, ResNet-56.

    Args:
        depth: number of layers, 6n+2.
        is_plain: whether it lacks skip connections.
    """

    depth: int
    is_plain: bool

    @property
    def name(self) -> str:
        return f"{'plain' if self.is_plain else 'ResNet'}-{self.depth}"

    def build(self, n_classes: int, width: int) -> "CifarResNet":
        """Return the network with new weights; with the same seed, both kinds get the same weights."""
        from resnet_fast.models import CifarResNet

        return CifarResNet(self.depth, n_classes, shortcut=None if self.is_plain else "A", width=width)


@dataclass(frozen=True)
class SkipStudy:
    """All settings of a study.

    Args:
        config: data, recipe, device and folder; its seed is the first one.
        n_seeds: runs of each network, with config.seed, config.seed + 1, …
        width: channels of the first stage.
        depths: of the shallow and the deep networks, 6n+2 each.

    Raises:
        ValueError: a setting breaks its rule; the message names the rule and the value.
    """

    config: TrainConfig
    n_seeds: int
    width: int
    depths: tuple[int, int] = (20, 56)

    def __post_init__(self) -> None:
        if world_size() > 1:
            raise ValueError(f"a study needs a single process, got {world_size()}")
        check_integer("seeds", self.n_seeds, *N_SEEDS)
        check_integer("width", self.width)
        if self.config.seed + self.n_seeds > 2**32:
            raise ValueError(f"seed + seeds must be at most 2**32, got {self.config.seed} + {self.n_seeds}")
        from resnet_fast.models.cifar import check_depth

        for depth in self.depths:
            check_depth(depth)
        shallow, deep = self.depths
        if not shallow < deep:
            raise ValueError(f"depths must be a smaller and a larger number, got {shallow} and {deep}")

    @property
    def networks(self) -> tuple[Network, ...]:
        """The plain shallow and plain deep network, then those with skip connections."""
        return tuple(Network(depth, is_plain) for is_plain in (True, False) for depth in self.depths)

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.n_seeds)

    def load(self) -> "ImageDataset":
        """Return the images; raise DataError if they are not available."""
        from resnet_fast.data import load_dataset

        dataset = load_dataset(self.config.dataset, self.config.data_dir)
        return halve(dataset) if self.config.dataset == "digits" else dataset


def small_study(*, n_seeds: int = 3, **settings: Any) -> SkipStudy:
    """Return the study of the digits; `settings` override fields of its TrainConfig."""
    return SkipStudy(_config(SMALL, n_seeds, settings), n_seeds, width=8)


def full_study(*, n_seeds: int = 3, **settings: Any) -> SkipStudy:
    """Return the paper's study; `settings` override fields of its TrainConfig."""
    return SkipStudy(_config(FULL, n_seeds, settings), n_seeds, width=16)


def _config(base: dict[str, Any], n_seeds: int, settings: dict[str, Any]) -> TrainConfig:
    check_integer("seeds", n_seeds, *N_SEEDS)  # before TrainConfig, which may import torch
    given = {name: value for name, value in settings.items() if value is not None}
    out = free_folder(f"skip-{base['dataset']}-{time.strftime('%Y%m%d-%H%M%S')}")
    return TrainConfig(**{**base, "out": out, **given})


def halve(dataset: "ImageDataset") -> "ImageDataset":
    """Return an in-memory data set at half its height and width; each pixel is the mean of four."""
    import torch.nn.functional as F

    from resnet_fast.data import TensorSplit
    from resnet_fast.data.dataset import channel_statistics

    def half(split: Any) -> "TensorSplit":
        images = F.avg_pool2d(split.images.float(), 2).round().byte()
        return TensorSplit(images, split.labels)

    train, test = half(dataset.train), half(dataset.test)
    mean, std = channel_statistics(train.images)
    crop = dataset.crop_padding // 2
    return replace(dataset, train=train, test=test, mean=mean, std=std, crop_padding=crop)
