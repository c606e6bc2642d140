"""An interrupted run, read from its folder: the settings, and the checkpoint to resume from.

The newest checkpoint is used or refused. The one before is never used silently; it must be named.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_fast.checkpoints.archive import read_regular
from resnet_fast.common.checks import difference, one_line, shown
from resnet_fast.training.checkpoint import CheckpointError, read_checkpoint
from resnet_fast.training.config import MOVABLE, TrainConfig
from resnet_fast.training.paths import CHECKPOINT, PREVIOUS, find_resumable
from resnet_fast.training.schema import IN_CHECKPOINT, IN_CONFIG_JSON, SETTINGS, check_entries, check_settings, fill_in
from resnet_fast.training.torchrun import world_size

MAX_CONFIG_BYTES = 2**24  # enough for 100,000 classes; parsed, a file needs ten times its size


class ResumeError(RuntimeError):
    """A run cannot be resumed; the message gives the reason and, if there is one, a remedy."""


@dataclass(frozen=True)
class SavedRun:
    """A run that can be resumed.

    Args:
        config: its settings.
        description: the contents of config.json.
        checkpoint: the checkpoint to resume from; None if no epoch is finished.
        is_newest: whether that is checkpoint.pt, not another one that was named.
    """

    config: TrainConfig
    description: dict[str, Any]
    checkpoint: dict[str, Any] | None
    is_newest: bool


def load_run(path: Path | str, **moved: Any) -> SavedRun:
    """Read the settings and the checkpoint of a run.

    Args:
        path: a run folder, for its checkpoint.pt, or a checkpoint in it, such as checkpoint-previous.pt.
        moved: new values for data_dir, mirror, device, workers, images, graph, time_budget, tensorboard or wandb.

    Returns:
        The run, for `resume`.

    Raises:
        TypeError: `path` is not a path.
        ValueError: `path` is not in a run folder, a value of `moved` breaks its rule, or another setting is in `moved`.
        ResumeError: config.json or the checkpoint is missing, damaged or foreign, or they do not belong together.
    """
    kept = [name for name in moved if name not in MOVABLE or name == "out"]
    if kept:
        raise ValueError(f"a resumed run keeps its settings except {', '.join(MOVABLE[:-1])}, got {', '.join(kept)}")
    target = find_resumable(path)
    out, name = target.parent, target.name
    description = _describe(out / "config.json")
    saved = {name: description[name] for name in SETTINGS}
    if "device" in moved or world_size() > 1:
        saved["graph"] = None  # chosen again for this machine
    config = TrainConfig(**{**saved, "out": out, **moved})

    if name == CHECKPOINT and not any((out / other).exists() for other in (CHECKPOINT, PREVIOUS, "metrics.csv")):
        return SavedRun(config, description, None, is_newest=True)
    try:
        checkpoint = _read(out / name, description)
    except CheckpointError as error:
        raise ResumeError(f"{error}; {_offer(out, name, description)}") from error
    return SavedRun(config, description, checkpoint, is_newest=name == CHECKPOINT)


def _describe(path: Path) -> dict[str, Any]:
    """Return the entries of a config.json; raise ResumeError if one breaks its rule."""
    try:
        data = read_regular(path)
        if len(data) > MAX_CONFIG_BYTES:
            raise ValueError(f"must have at most {MAX_CONFIG_BYTES:,} bytes, got {len(data):,}")
        description = fill_in(_parse(data))
        check_settings(description)
        check_entries(description, IN_CONFIG_JSON)
    except ValueError as error:
        raise ResumeError(f"{path} {one_line(error)}") from error
    return description


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {one_line(error)}") from error


def _read(path: Path, description: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint that belongs to config.json."""
    checkpoint = read_checkpoint(path, IN_CHECKPOINT)
    if unlike := difference(checkpoint["classes"], description["classes"], "the checkpoint", "config.json"):
        raise CheckpointError(f"{path} belongs to another run: in the classes, {unlike}")
    settings = {name: checkpoint["config"][name] for name in SETTINGS if name not in MOVABLE}
    for name, value in {**settings, "mean": checkpoint["mean"], "std": checkpoint["std"]}.items():
        if value != description[name]:
            there, here = shown(value), shown(description[name])
            raise CheckpointError(f"{path} belongs to another run: {name} is {there} there and {here} in config.json")
    if checkpoint["epoch"] > description["epochs"]:
        raise CheckpointError(f"{path} is of epoch {checkpoint['epoch']}, the run has {description['epochs']}")
    return checkpoint


def _offer(out: Path, refused: str, description: dict[str, Any]) -> str:
    """Return the command that resumes from the other checkpoint, or the reason why that is refused, too."""
    reasons = []
    for name in (CHECKPOINT, PREVIOUS):
        if name == refused:
            continue
        try:
            epoch = _read(out / name, description)["epoch"]
        except CheckpointError as error:
            reasons.append(f"{error}; no whole checkpoint is left")
        else:
            return f"{out / name} is whole: --resume {shlex.quote(str(out / name))} resumes after epoch {epoch}"
    return "; ".join(reasons)
