"""The environment that torchrun sets for each process: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE."""

import os
import shlex
from pathlib import Path


def world_size() -> int:
    """Return the number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the rank of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def is_first_process() -> bool:
    """Return whether this process prints and writes."""
    return rank() == 0


def is_first_on_machine() -> bool:
    """Return whether this process reports an error that all processes share."""
    return world_size() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"


def command() -> str:
    """Return the command that starts processes like these: resnet-fast, or torchrun."""
    if world_size() == 1:
        return "resnet-fast"
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    n_machines = world_size() // n_here
    machines = f"--nnodes {n_machines} --rdzv-backend c10d --rdzv-endpoint HOST:29500 " if n_machines > 1 else ""
    return f"torchrun {machines}--nproc-per-node {n_here} -m resnet_fast.cli"


def format_train_on(run: Path) -> str:
    """Return a hint on how to train a finished run further."""
    return f"to train further from its weights, in a new run: {command()} train --weights {shlex.quote(str(run))} …"
