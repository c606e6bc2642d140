"""Kills runs by SIGKILL at random moments and resumes each, for test_background.py.

    python killed_worker.py FOLDER N_RUNS    # prints how many of them were killed in the middle of writing a file

Forked from here: to import torch takes longer than all.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from test_train_resume import check_whole
from tiny_run import config_for, same_bits, use_tiny

from resnet_fast.training import EpochMetrics, Reporter, resume, train
from resnet_fast.training.checkpoint import read_checkpoint

EPOCHS = 4


def slow_fsync(number: int, fsync=os.fsync) -> None:
    """A disk on which most of the time goes to writing, also while an epoch trains."""
    time.sleep(0.01)
    fsync(number)


class Rows(Reporter):
    """Writes a byte for each epoch that is said to be written."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT)

    def end_epoch(self, metrics: EpochMetrics) -> None:
        os.write(self.file, b".")


def start(out: Path) -> int:
    """Start a run, and return the number of its process once it has begun."""
    number = os.fork()
    if number == 0:
        os.fsync = slow_fsync
        try:
            train(config_for(out, epochs=EPOCHS), Rows(out.with_suffix(".rows")))
        finally:
            os._exit(0)
    while not (out / "config.json").exists():
        time.sleep(0.001)
    return number


def main(folder: Path, n_runs: int) -> int:
    began = time.monotonic()
    os.waitpid(start(folder / "straight"), 0)
    seconds, n_unfinished = time.monotonic() - began, 0
    for i in range(n_runs):
        out = folder / str(i)
        number = start(out)
        time.sleep(random.uniform(0, seconds))
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        check_whole(out)
        n_epochs = read_checkpoint(out / "checkpoint.pt")["epoch"] if (out / "checkpoint.pt").exists() else 0
        assert n_epochs >= out.with_suffix(".rows").stat().st_size, f"{out} has lost an epoch"
        n_unfinished += any(out.glob(".*.tmp"))
        resume(out)
        assert same_bits(out, folder / "straight"), out
        assert not list(out.glob(".*.tmp")), out
    return n_unfinished


if __name__ == "__main__":
    torch.set_num_threads(1)
    use_tiny(setattr)
    print(main(Path(sys.argv[1]), int(sys.argv[2])))
