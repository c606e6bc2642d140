"""The weights that a run starts from: another run's, or those of a file."""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from torch import nn

from resnet_fast.checkpoints import CheckpointMismatch, load_checkpoint
from resnet_fast.training.checkpoint import CheckpointError
from resnet_fast.training.run_folder import CHECKPOINT

MAX_CLASSES = 10**6  # of a file whose last layer is replaced


class Origin(NamedTuple):
    """Where the first weights are from; its str() is for people.

    Args:
        path: the file.
        sha256: the digest of its bytes.
        n_there, n_here: numbers of classes of the file and of the run; if they differ, the last layer is new.
    """

    path: Path
    sha256: str
    n_there: int
    n_here: int

    def __str__(self) -> str:
        line = f"weights of {self.path}"
        if self.n_there != self.n_here:
            line += f"; new last layer: {self.n_there} classes there, {self.n_here} here"
        return line


def weights_file(path: Path) -> Path:
    """Return the file of weights that `path` names: itself, or the checkpoint of a run folder.

    Raises:
        ValueError: there is none.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"weights must be a run folder or a file of weights, {file} is no file")
    return file


def load_weights(model: nn.Module, path: Path) -> Origin:
    """Put the weights and running statistics of a run or a file into a new network.

    Args:
        model: a network of any family. Its last layer stays unchanged if the file has another number of classes.
        path: a run folder, or what `load_checkpoint` reads.

    Raises:
        ValueError: there is no such file.
        CheckpointMismatch: the weights belong to another network.
        CheckpointError: the file is damaged, or holds no weights.
        OSError: the file cannot be read.
    """
    path = weights_file(path)
    *_, (name, head) = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    n_there = head.out_features
    try:
        try:
            load_checkpoint(model, path)
        except CheckpointMismatch as mismatch:
            n_there = _classes_there(mismatch, name, head)
            model.set_submodule(name, nn.Linear(head.in_features, n_there))
            load_checkpoint(model, path)
            model.set_submodule(name, head)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except CheckpointMismatch:
        raise
    except (ValueError, ModuleNotFoundError) as error:
        raise CheckpointError(str(error)) from error
    return Origin(path, digest, n_there, head.out_features)


def _classes_there(mismatch: CheckpointMismatch, name: str, head: nn.Linear) -> int:
    """Return the file's number of classes if nothing else differs; otherwise raise the mismatch again."""
    in_file = {row[0]: row[1] for row in mismatch.unlike}
    is_head_alone = set(in_file) == {f"{name}.weight", f"{name}.bias"} and not (mismatch.missing or mismatch.unexpected)
    shape = re.fullmatch(rf"\[(\d+), {head.in_features}\]", in_file.get(f"{name}.weight", ""))
    if not is_head_alone or shape is None or int(shape[1]) > MAX_CLASSES:
        raise mismatch
    return int(shape[1])
