"""The weights that a run starts from: another run's, or those of a file."""

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

HUB_WEIGHTS = "model.safetensors"  # as huggingface_hub calls the file


class Origin(NamedTuple):
    """Where the first weights are from; its str() is for people.

    Args:
        path: the file.
        sha256: the digest of its bytes.
        n_there, n_here: numbers of classes of the file, 0 if it has no last layer, and of the run.
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
    """Return the file of weights that `path` names: itself, the checkpoint of a run folder, or model.safetensors of a
    folder from the Hugging Face Hub.

    Raises:
        ValueError: there is none.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    if not file.is_file() and (path / HUB_WEIGHTS).is_file():
        file = path / HUB_WEIGHTS
    if not file.is_file():
        reason = "is no file" if file.exists() else "does not exist"
        raise ValueError(f"weights must be a run folder or a file of weights, {file} {reason}")
    return file


def load_weights(model: nn.Module, path: Path, model_name: str, new_head: bool = False) -> Origin:
    """Put the weights and running statistics of a run or a file into a new network.

    Args:
        model: a network of any family. Its last layer stays unchanged if the file has none, or one of other classes.
        path: a run folder, or what `load_checkpoint` reads.
        model_name: the name of the network.
        new_head: leave the last layer unchanged, whatever the file has for it.

    Raises:
        ValueError: there is no such file, or a run of another network wrote it.
        CheckpointMismatch: the weights belong to another network.
        CheckpointError: the file is damaged, or holds no weights, or some that are not finite.
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
    """Raise ValueError if the file is of a run of another network: names and shapes alone may be the same."""
    try:
        theirs = read_checkpoint(path, ("config",))["config"]["model"]
    except CheckpointError:  # from elsewhere, or damaged, which load_checkpoint says
        return
    if theirs != model_name:
        raise ValueError(
            f"weights must be of the run's network, {model_name}; {path} holds those of {theirs}: --model {theirs}?"
        )


def _load(model: nn.Module, path: Path) -> Loaded:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are not finite, which are refused
        return load_checkpoint(model, path)


def _classes_there(mismatch: CheckpointMismatch, name: str, head: nn.Linear) -> int:
    """Return the file's number of classes if nothing else differs; otherwise raise the mismatch again."""
    in_file, own = {row[0]: row[1] for row in mismatch.unlike}, {f"{name}.weight", f"{name}.bias"}
    if set(mismatch.missing) == own and not (in_file or mismatch.unexpected):
        return 0
    shape = re.fullmatch(rf"\[(\d+), {head.in_features}\]", in_file.get(f"{name}.weight", ""))
    if set(in_file) != own or mismatch.missing or mismatch.unexpected or shape is None:
        raise mismatch
    # A view that stands for more values than the file has bytes would take the memory of all of them.
    if int(shape[1]) == 0 or int(shape[1]) * head.in_features > mismatch.path.stat().st_size:
        raise mismatch
    return int(shape[1])
