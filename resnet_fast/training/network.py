"""The network of a run and its initial weights."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.data import ImageDataset, normalize
from resnet_fast.models.registry import MODELS
from resnet_fast.nn import FusedBatchNorm2d
from resnet_fast.training.config import N_WHITENING, TrainConfig

WHITENING_IMAGES = 5000
WHITENING_EPS = 5e-4  # added to the variances, so that directions of almost no variance are not amplified (Jordan 2024)


def make_network(config: TrainConfig, n_classes: int) -> nn.Module:
    """Return the network, its weights drawn from torch's global generator, then initialized as the recipe says."""
    if config.backend != "fused":
        model = MODELS[config.model].make_plain(n_classes, config.stem)
    elif config.ghost_batch_size:
        norm = partial(FusedBatchNorm2d, ghost_batch_size=config.ghost_batch_size)
        model = MODELS[config.model].make(n_classes, config.stem, norm)
    else:
        model = MODELS[config.model].make(n_classes, config.stem)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = config.bn_momentum
    if config.zero_gamma:
        zero_gamma(model)
    if config.dirac:
        start_as_identity(model)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network: the modules with a `conv2`, which no stem has."""
    return [module for module in model.modules() if isinstance(getattr(module, "conv2", None), nn.Conv2d)]


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return the last linear layer, which gives the logits, and its name.

    Raises:
        ValueError: the network has none.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"the network must have an nn.Linear as its last layer, {type(model).__name__} has none")
    return layers[-1]


def freeze(model: nn.Module, frozen: str, stages: Sequence[str]) -> None:
    """Exclude the parameters of some stages from training; `TrainingStep` then freezes their batch norms, too.

    Args:
        model: the network, not wrapped.
        frozen: names of stages, as in "stem,layer1"; "stem" is everything before the first stage.
        stages: all stages of the network, in order.
    """
    children = [name for name, _ in model.named_children()]
    stem = children[: children.index(stages[0].partition(".")[0])]
    for stage in filter(None, frozen.split(",")):
        for name in stem if stage == "stem" else [stage]:
            model.get_submodule(name).requires_grad_(False)


def zero_gamma(model: nn.Module) -> None:
    """Set the weight of every block's last batch norm to 0, so that each block starts as its shortcut."""
    for block in blocks_of(model):
        *_, last = (norm for name, norm in block.named_children() if name.startswith("bn"))
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]


@torch.no_grad()
def start_as_identity(model: nn.Module) -> None:
    """Initialize the first C_in outputs of every 3x3 convolution in a block as its inputs; the stem is unchanged."""
    for block in blocks_of(model):
        for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
            if conv.kernel_size == (3, 3) and conv.groups == 1:
                nn.init.dirac_(conv.weight[: conv.in_channels])


@torch.no_grad()
def whiten_stem(conv: nn.Conv2d, dataset: ImageDataset, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Initialize a 3x3 convolution of 3 channels with whitening filters of the training images' patches (Page 2019).

    With the covariance V·diag(λ)·Vᵀ of the 27 values of a patch, filter k is ±v_k / √(λ_k + eps), so that the outputs
    of one sign are uncorrelated and have the same variance. Filters beyond the first 54 are unchanged.

    Raises:
        ValueError: the convolution is not 3x3 on 3 channels with at least 54 filters.
    """
    if conv.weight.shape[1:] != (3, 3, 3) or len(conv.weight) < N_WHITENING:
        raise ValueError(f"the stem must have shape [{N_WHITENING} or more, 3, 3, 3], got {list(conv.weight.shape)}")
    n_images = len(dataset.train)
    spaced = torch.linspace(0, n_images - 1, min(n_images, WHITENING_IMAGES)).round().long()
    covariance = torch.zeros(27, 27, dtype=torch.float64)
    n_patches = 0
    for images, _ in dataset.train.subset(spaced).batches(500):
        patches = F.unfold(normalize(images, mean, std), 3).transpose(1, 2).reshape(-1, 27).double()
        covariance += (patches.T @ patches).cpu()
        n_patches += len(patches)
    variances, directions = torch.linalg.eigh(covariance / n_patches)
    filters: Tensor = directions.T / (variances[:, None] + WHITENING_EPS).sqrt()
    conv.weight[:N_WHITENING] = torch.cat([filters, -filters]).view(N_WHITENING, 3, 3, 3).to(conv.weight)
