"""The initial weights of a run, loaded from another run or a file."""

import copy
import hashlib
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from torch import nn

from resnet_fast.checkpoints import CheckpointMismatch, Loaded, load_checkpoint
from resnet_fast.common.checks import few
from resnet_fast.training.checkpoint import CheckpointError, read_checkpoint
from resnet_fast.training.network import find_head
from resnet_fast.training.run_folder import CHECKPOINT

HUB_WEIGHTS = "model.safetensors"  # huggingface_hub's name for the file


class Origin(NamedTuple):
    """The source of the initial weights; str() describes it.

    Args:
        path: the file.
        sha256: the digest of its bytes.
        n_there: number of classes in the file, 0 if it has no last layer.
        n_here: number of classes in the run.
        new_head: whether the last layer is new.
    """

    path: Path
    sha256: str
    n_there: int
    n_here: int
    new_head: bool

    def __str__(self) -> str:
        line = f"weights of {self.path}"
        if self.new_head:
            line += f"; new last layer: {self.n_there or 'no'} classes there, {self.n_here} here"
        return line


def weights_file(path: Path) -> Path:
    """Return the file of weights: `path`, or in a folder of a run or from the Hugging Face Hub the one with weights.

    Raises:
        ValueError: there is no such file.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    if not file.is_file() and (path / HUB_WEIGHTS).is_file():
        file = path / HUB_WEIGHTS
    if not file.is_file():
        reason = "is not a file" if file.exists() else "does not exist"
        raise ValueError(f"weights must be a run folder or a file of weights, {file} {reason}")
    return file


def load_weights(model: nn.Module, path: Path, model_name: str, new_head: bool = False) -> Origin:
    """Load the weights and running statistics of a run or a file into a new network.

    Args:
        model: a network. Its last layer is unchanged if the file has none, or one with another number of classes.
        path: a run folder, a folder from the Hugging Face Hub, or a file that `load_checkpoint` reads.
        model_name: the name of the network.
        new_head: whether to leave the last layer unchanged in any case.

    Raises:
        ValueError: there is no such file, or a run of another network wrote it.
        CheckpointMismatch: the weights belong to another network.
        CheckpointError: the file is damaged, holds no weights, or holds weights that are not finite.
        OSError: the file cannot be read.
    """
    path = weights_file(path)
    _check_network(path, model_name)
    name, head = find_head(model)
    n_there, before = head.out_features, copy.deepcopy(head.state_dict())
    try:
        try:
            loaded = _load(model, path)
        except CheckpointMismatch as mismatch:
            n_there = _classes_there(mismatch, name, head)
            model.set_submodule(name, nn.Linear(head.in_features, n_there) if n_there else nn.Identity())
            loaded = _load(model, path)
            model.set_submodule(name, head)
        if new_head:
            head.load_state_dict(before)
        if loaded.not_finite:
            raise ValueError(f"{path} holds values that are not finite: {few(loaded.not_finite, 3)}")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except CheckpointMismatch:
        raise
    except (ValueError, ModuleNotFoundError) as error:
        raise CheckpointError(str(error)) from error
    return Origin(path, digest, n_there, head.out_features, new_head or n_there != head.out_features)


def _check_network(path: Path, model_name: str) -> None:
    """Raise ValueError if a run of another network wrote the file; names and shapes may agree nevertheless."""
    try:
        theirs = read_checkpoint(path, ("config",))["config"]["model"]
    except CheckpointError:  # not a run's, or damaged, which load_checkpoint reports
        return
    if theirs != model_name:
        raise ValueError(
            f"weights must belong to the run's network, {model_name}, got {path} of {theirs}: --model {theirs}?"
        )


def _load(model: nn.Module, path: Path) -> Loaded:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values that are not finite are refused later
        return load_checkpoint(model, path)


def _classes_there(mismatch: CheckpointMismatch, name: str, head: nn.Linear) -> int:
    """Return the file's number of classes if nothing else differs; otherwise raise the mismatch again."""
    in_file, own = {row[0]: row[1] for row in mismatch.unlike}, {f"{name}.weight", f"{name}.bias"}
    if set(mismatch.missing) == own and not (in_file or mismatch.unexpected):
        return 0
    shape = re.fullmatch(rf"\[(\d+), {head.in_features}\]", in_file.get(f"{name}.weight", ""))
    if set(in_file) != own or mismatch.missing or mismatch.unexpected or shape is None:
        raise mismatch
    # A stored view may stand for more values than the file has bytes; do not allocate memory for all of them.
    if int(shape[1]) == 0 or int(shape[1]) * head.in_features > mismatch.path.stat().st_size:
        raise mismatch
    return int(shape[1])
