"""A trained network and the constants needed to use it, from the checkpoint of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_fast.common.checks import shown
from resnet_fast.models.registry import MODELS
from resnet_fast.training.checkpoint import CheckpointError, read_checkpoint
from resnet_fast.training.config import check_device
from resnet_fast.training.paths import CHECKPOINT, PREVIOUS, find_checkpoint
from resnet_fast.training.schema import TO_PREDICT, check_settings
from resnet_fast.training.structure import first_difference


@dataclass(frozen=True)
class Trained:
    """A network as of the end of a training epoch.

    Args:
        model: the network, in evaluation mode: normalized images [N, 3, image_size, image_size] to logits [N, classes].
        classes: the name of each logit.
        mean, std: per channel, of images in [0, 1], to normalize with.
        image_size: height and width in pixels.
        config: the settings of the training, `TrainConfig.as_dict()`.
        epoch: the epoch after which the checkpoint was written.
        path: path of the checkpoint.
    """

    model: nn.Module
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    config: dict[str, Any]
    epoch: int
    path: Path

    @property
    def description(self) -> str:
        """The network, its data set and the epoch, in a few words."""
        return f"{self.config['model']} ({self.config['stem']} stem) on {self.config['dataset']}, epoch {self.epoch}"


def load_trained(path: Path | str, device: torch.device | str = "cpu") -> Trained:
    """Load the network of a run. Every byte of the checkpoint is checked, and no code in it is run.

    Args:
        path: a run folder with a checkpoint.pt, or a checkpoint file.
        device: device of the network.

    Returns:
        A `Trained`: the network in evaluation mode with its classes and normalization.

    Raises:
        TypeError: `path` is not a path.
        ValueError: `path` is neither a run folder nor a file, or `device` is unknown or unavailable.
        CheckpointError: the checkpoint is missing, is damaged, comes from another program or an earlier version, or its
            weights do not fit the network that it names.
    """
    path = find_checkpoint(path)
    device = check_device(device)
    if not path.exists() and not path.with_name(PREVIOUS).exists():
        raise CheckpointError(f"{path} is missing: no epoch of that run was finished")
    try:
        state = read_checkpoint(path, TO_PREDICT)
    except CheckpointError as error:
        previous = path.with_name(PREVIOUS)
        if path.name != CHECKPOINT or not previous.exists():
            raise
        raise CheckpointError(f"{error}; {previous} holds the epoch before") from error
    model = _build(path, state).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trained(
        model=model.eval(),
        classes=tuple(state["classes"]),
        mean=tuple(state["mean"]),
        std=tuple(state["std"]),
        image_size=state["image_size"],
        config=state["config"],
        epoch=state["epoch"],
        path=path,
    )


def _build(path: Path, state: dict[str, Any]) -> nn.Module:
    name, stem = state["config"]["model"], state["config"]["stem"]
    if name not in MODELS:
        raise CheckpointError(f"{path} holds the network {shown(name)}, which this version does not have")
    try:
        check_settings(state["config"])
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error
    with torch.device("meta"):  # so that a file with a million classes takes no memory before it fits
        expected = MODELS[name].make(len(state["classes"]), stem).state_dict()
    if unlike := first_difference(expected, state["model"], "model"):
        raise CheckpointError(f"{path} does not fit {name} ({stem} stem): {unlike}")
    model = MODELS[name].make(len(state["classes"]), stem)
    model.load_state_dict(state["model"])
    return model
