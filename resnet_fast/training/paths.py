"""The folder of a run, and the checkpoints in it."""

import itertools
import os
from contextlib import suppress
from pathlib import Path

from resnet_fast.common.checks import check_type

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"


def free_folder(name: str) -> Path:
    """Return runs/NAME, or runs/NAME-2, -3 … if a run that started in the same second has that name."""
    candidates = itertools.chain([Path("runs") / name], (Path("runs") / f"{name}-{i}" for i in itertools.count(2)))
    return next(folder for folder in candidates if not folder.exists())


def check_is_free(out: Path) -> None:
    """Raise FileExistsError unless `out` is an empty folder or does not exist, OSError if it cannot exist."""
    with suppress(FileNotFoundError, NotADirectoryError):
        out.lstat()  # raises if a name is too long, which lexists hides
    there = next(path for path in (out, *out.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise FileExistsError(f"out must be a folder, {there} is a file")
    if there != out:
        return
    names = sorted(path.name for path in out.iterdir())
    if names:
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise FileExistsError(f"out must be a new or empty folder, {out} already holds {shown}; name another one")


def find_checkpoint(path: Path | str) -> Path:
    """Return the checkpoint of the run folder `path`, which may be missing, or `path` itself if it is a file.

    Raises:
        ValueError: `path` does not exist, or is a folder without a run.
    """
    check_type("path", path, str, os.PathLike)
    path = Path(os.path.expanduser(path))
    if not path.is_dir():
        if not path.exists():
            raise ValueError(f"{path} does not exist; a run folder or a checkpoint in one is needed")
        return path
    if not any((path / name).exists() for name in (CHECKPOINT, PREVIOUS, "config.json")):
        raise ValueError(f"{path} is not a run folder: neither {CHECKPOINT} nor config.json is there")
    return path / CHECKPOINT


def find_resumable(path: Path | str) -> Path:
    """Return the checkpoint to resume from, which is next to config.json; it may be missing.

    Raises:
        ValueError: `path` is neither a run folder nor in one.
    """
    check_type("path", path, str, os.PathLike)
    path = Path(os.path.expanduser(path))
    checkpoint = path / CHECKPOINT if path.is_dir() else path
    if not (checkpoint.parent / "config.json").exists():
        raise ValueError(f"resume must be a run folder or a checkpoint in one, {path} is neither: no config.json there")
    return checkpoint
