"""Runs that are killed by SIGKILL, at random times or before their k-th call of the file system; see test_train_resume.

    python resume_worker.py FOLDER random        # FOLDER/0, 1, … hold runs that were resumed until they were finished
    python resume_worker.py FOLDER calls

Forks instead of new processes: importing torch takes longer than such a run. Prints how often it killed.
"""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import tiny_run as shared
import torch

from resnet_fast.training import checkpoint, resume, train
from resnet_fast.training.step import make_optimizer

FILE_CALLS = ("open", "fsync", "link", "replace", "unlink", "mkdir")


def fork(work: Callable[..., object], *args: object) -> int:
    """Do the work in a process of its own, and return its number."""
    process = os.fork()
    if process == 0:
        try:
            work(*args)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process


def is_killed(process: int) -> bool:
    """Wait for the end of a process, which is SIGKILL or success."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def start_or_resume(out: Path) -> None:
    if (out / "config.json").exists():
        resume(out)
    else:
        shutil.rmtree(out, ignore_errors=True)  # a folder in which nothing began is not used again
        train(shared.config_for(out))


def check_whole(out: Path) -> None:
    """What has its name is whole, at whatever moment the process was killed."""
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        if (out / name).exists():
            checkpoint.read_checkpoint(out / name)
    if (out / "checkpoint-previous.pt").exists():
        assert (out / "checkpoint.pt").exists()
    if (out / "metrics.csv").exists():
        assert (out / "metrics.csv").read_bytes().endswith(b"\n")


def kill_at_random_times(folder: Path, n_kills: int = 20) -> int:
    delays = random.Random(0)
    killed = runs = 0
    while killed < n_kills:
        out = folder / str(runs)
        runs += 1
        finished = False
        while not finished:
            process = fork(start_or_resume, out)
            if killed < n_kills:
                time.sleep(delays.uniform(0, 0.1))
                os.kill(process, signal.SIGKILL)
            finished = not is_killed(process)
            killed += not finished
            check_whole(out)
    return killed


def kill_before_each_call(folder: Path) -> int:
    def work(out: Path, last: int) -> None:
        n_calls = 0

        def counted(call: Callable) -> Callable:
            def count(*args, **kwargs):
                nonlocal n_calls
                n_calls += 1
                if n_calls == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return count

        for name in FILE_CALLS:
            setattr(os, name, counted(getattr(os, name)))
        train(shared.config_for(out))

    killed = 0
    while is_killed(fork(work, folder / str(killed), killed + 1)):
        check_whole(folder / str(killed))
        assert not is_killed(fork(start_or_resume, folder / str(killed)))
        killed += 1
    return killed


def prepare(folder: Path) -> None:
    """Import what a run imports late, without autograd, whose engine does not survive a fork."""
    assert not is_killed(fork(train, shared.config_for(folder / "warm")))
    resume(folder / "warm")
    shutil.rmtree(folder / "warm")
    make_optimizer(shared.Tiny(3), shared.config_for(folder))  # which runs a step


if __name__ == "__main__":
    torch.set_num_threads(1)
    shared.use_tiny(setattr)
    where = Path(sys.argv[1])
    prepare(where)
    print({"random": kill_at_random_times, "calls": kill_before_each_call}[sys.argv[2]](where))
