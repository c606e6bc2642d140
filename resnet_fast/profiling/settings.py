"""Settings of the training step that is profiled."""

import time
from dataclasses import replace
from pathlib import Path

from resnet_fast.training.config import TrainConfig
from resnet_fast.training.paths import free_folder
from resnet_fast.training.recipes import DEFAULT_RECIPES

BATCH_SIZE = {"cpu": 32, "cuda": 128}
# Small, because the labels are random, and infinite or NaN values would change the step.
LEARNING_RATE = 0.01


def profile_config(
    model: str = "resnet18",
    stem: str | None = None,
    batch_size: int | None = None,
    precision: str = "auto",
    device: str = "auto",
    image_size: int = 32,
    out: Path | None = None,
    optimizer: str = "sgd",
) -> TrainConfig:
    """Return the checked settings of the step. The arguments are those of TrainConfig.

    Defaults: the model's stem; batch_size 32 on a CPU, 128 on a GPU.

    Raises:
        ValueError: a setting breaks its rule in TrainConfig.
    """
    config = TrainConfig(
        model=model,
        stem=stem,  # type: ignore[arg-type]  (None: the model's)
        batch_size=BATCH_SIZE["cpu"] if batch_size is None else batch_size,
        precision=precision,
        device=device,
        dataset="folder",  # of any size; the recipe remains CIFAR-10's
        recipe=DEFAULT_RECIPES["cifar10"],
        image_size=image_size,
        optimizer=optimizer,
        lr=LEARNING_RATE,
        out=free_folder(f"profile-{model}-{time.strftime('%Y%m%d-%H%M%S')}") if out is None else out,
    )
    if batch_size is None and config.device != "cpu":
        config = replace(config, batch_size=BATCH_SIZE["cuda"])
    return config
