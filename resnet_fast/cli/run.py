"""The runs of `resnet-fast train` once its options are checked, and how they end."""

import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer

from resnet_fast.checkpoints import CheckpointMismatch
from resnet_fast.cli.app import stop, stop_all
from resnet_fast.common.memory import keep_freed_memory
from resnet_fast.data import DataError
from resnet_fast.training import DivergedError, Reporter, Result, ResumeError, TrainConfig, load_run
from resnet_fast.training import resume as resume_training
from resnet_fast.training import train as run_training
from resnet_fast.training.checkpoint import CheckpointError
from resnet_fast.training.console import format_repeated, make_reporter
from resnet_fast.training.paths import check_is_free
from resnet_fast.training.processes import LostProcessError, OtherProcessError, connect
from resnet_fast.training.repeat import repeated, write_summary
from resnet_fast.training.tensorboard import TensorBoardError
from resnet_fast.training.torchrun import command, is_first_process
from resnet_fast.training.weights_and_biases import WandbError


def run_once(config: TrainConfig) -> None:
    """Train a network."""
    run_to_the_end(config, lambda reporter: run_training(config, reporter))


def run_repeated(config: TrainConfig, n_runs: int) -> None:
    """Train with one seed after the other, each in a folder of its own."""
    with failures_told(config), connect(config.device) as processes:
        processes.first_only(lambda: check_is_free(config.out))
        results = []
        for one in repeated(config, n_runs):
            results.append(run_to_the_end(one, lambda reporter, one=one: run_training(one, reporter)))
            processes.first_only(lambda: write_summary(config.out, results))  # a later run may fail
        if is_first_process():
            for line in format_repeated(config.out, results):
                typer.echo(line)


def run_on(path: Path, moved: dict[str, Any]) -> None:
    """Resume the run in `path`."""
    try:
        saved = load_run(path, **moved)
    except ValueError as error:
        stop_all(2, f"error: {error}")
    except (ResumeError, OSError) as error:
        stop_all(1, f"error: {error}")
    run_to_the_end(saved.config, lambda reporter: resume_training(saved, reporter))


class _Terminated(BaseException):
    """Raised by SIGTERM."""


def run_to_the_end(config: TrainConfig, run: Callable[[Reporter], Result]) -> Result:
    """Run and report the progress."""
    if config.device == "cpu":
        keep_freed_memory()
    with failures_told(config):
        reporter = make_reporter()
        try:
            with _sigterm_raises():
                result = run(reporter)
        finally:
            reporter.close()
    reporter.finish(result)
    return result


@contextmanager
def failures_told(config: TrainConfig) -> Iterator[None]:
    """Stop on a failure with its reason, the files kept, and the command to resume; one process prints it."""
    try:
        yield
    except FileExistsError as error:
        stop(2, f"error: {error}")
    except CheckpointMismatch as error:  # from --weights
        first, *rest = str(error).split("\n")
        stop(1, f"error: {first}", *rest)
    except ValueError as error:
        stop_all(2, f"error: {error}")
    except (KeyboardInterrupt, _Terminated) as arrived:
        code, word = (130, "interrupted") if isinstance(arrived, KeyboardInterrupt) else (143, "terminated")
        if not is_first_process():
            raise typer.Exit(code) from None
        stop(code, f"{word}; {_what_is_kept(config.out)}{_how_to_resume(config.out)}")
    except DivergedError as error:
        kept = f"error: {error}; {_what_is_kept(config.out)}; --resume would come to the same end"
        stop_all(1, kept if is_first_process() else None)
    except OtherProcessError:
        stop_all(1, None)
    except LostProcessError as error:
        kept = f"error: {error}; {_what_is_kept(config.out)}{_how_to_resume(config.out)}"
        stop_all(1, kept if is_first_process() else None)
    except (ResumeError, CheckpointError, TensorBoardError, WandbError, BlockingIOError) as error:
        stop(1, f"error: {error}")
    except torch.OutOfMemoryError:
        hint = "the device is out of memory: try a smaller --batch-size, or --accumulate"
        stop(1, f"error: {hint}; {_what_is_kept(config.out)}{_how_to_resume(config.out)}")
    except (DataError, OSError) as error:
        # With several processes only the first one knows the folder, and learns that this one is lost.
        started = is_first_process() and _is_started(config.out)
        stop(1, f"error: {error}" + (f"; {_what_is_kept(config.out)}{_how_to_resume(config.out)}" if started else ""))
    except RuntimeError as error:
        if not (config.deterministic and "deterministic" in str(error)):
            raise
        stop(1, f"error: --deterministic refuses an operation: {' '.join(str(error).split())[:300]}")


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raise _Terminated in the block on SIGTERM, as Ctrl-C raises KeyboardInterrupt."""
    process = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != process:  # a process that reads images inherits this handler until torch replaces it
            os._exit(143)
        if hasattr(signal, "SIGCHLD"):
            # The same SIGTERM may end processes that read images, for which torch would raise its own exception.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _is_started(out: Path) -> bool:
    return os.path.isfile(out / "config.json")  # Path.is_file() raises for a long name


def _how_to_resume(out: Path) -> str:
    return f"; to resume: {command()} train --resume {shlex.quote(str(out))}" if _is_started(out) else ""


def _what_is_kept(out: Path) -> str:
    """Return which files an unfinished run has left."""
    if not _is_started(out):
        return "nothing was written"
    if not (out / "metrics.csv").is_file():
        return f"no epoch was finished, {out} keeps config.json only"
    epochs = (out / "metrics.csv").read_bytes().count(b"\n") - 1
    return f"{out} keeps the checkpoint, metrics and curves up to epoch {epochs}"
