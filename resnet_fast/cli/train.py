"""`resnet-fast train`."""

import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from resnet_fast.checkpoints import CheckpointMismatch
from resnet_fast.cli.app import app, stop
from resnet_fast.cli.settings import parse_seconds, with_settings
from resnet_fast.data import DataError
from resnet_fast.training import (
    DivergedError,
    Reporter,
    Result,
    ResumeError,
    TrainConfig,
    load_run,
)
from resnet_fast.training import resume as resume_training
from resnet_fast.training import train as run_training
from resnet_fast.training.checkpoint import CheckpointError
from resnet_fast.training.console import format_repeated, format_train_on, make_reporter
from resnet_fast.training.processes import (
    LostProcessError,
    OtherProcessError,
    command,
    is_first_on_machine,
    is_first_process,
    join,
)
from resnet_fast.training.repeat import repeated, write_summary
from resnet_fast.training.run_folder import check_is_free
from resnet_fast.training.saved_run import MOVABLE
from resnet_fast.training.tensorboard import TensorBoardError

# What a run that goes on may be told: where the data are and what computes, not what is computed.
BESIDE_RESUME = tuple(name for name in MOVABLE if name != "out")

QUIET = 5  # seconds that a process waits for another to speak


def _option_names(parameters: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in parameters)


@app.command()
@with_settings
def train(
    context: typer.Context,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_FOLDER",
            help="Go on with a run that was stopped, after its last finished epoch, or with a checkpoint named in its "
            f"folder. Its settings stay; beside this only {_option_names(BESIDE_RESUME)} may be given.",
            show_default=False,
        ),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(min=1, help="Train so many times, with --seed, --seed + 1, …, and report mean and deviation."),
    ] = 1,
    **settings: Any,
) -> None:
    """Train a network; write config.json, metrics.csv, curves.png, checkpoint.pt and more to a run folder.

    On several GPUs: torchrun --nproc-per-node 8 -m resnet_fast.cli train …
    """
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        if "time_budget" in given:
            given["time_budget"] = parse_seconds(given["time_budget"])
        if resume is None:
            config = TrainConfig(**given)
    except ValueError as error:
        _stop_all(2, f"error: {error}")
    if resume is not None:
        _resume(given, repeat, resume)
    elif repeat > 1:
        _repeat(config, repeat)
    else:
        _run_to_the_end(config, lambda reporter: run_training(config, reporter))


def _resume(given: dict[str, Any], repeat: int, path: Path) -> None:
    """Go on with the run in `path`."""
    refused = [name for name in given if name not in BESIDE_RESUME] + (["repeat"] if repeat > 1 else [])
    if refused:
        train_on = f"; {format_train_on(path)}" if "epochs" in refused else ""
        _stop_all(
            2,
            f"error: --resume keeps the settings of the run; beside it only {_option_names(BESIDE_RESUME)} may be "
            f"given, got {_option_names(refused)}{train_on}",
        )
    try:
        saved = load_run(path, **given)
    except ValueError as error:
        _stop_all(2, f"error: {error}")
    except (ResumeError, OSError) as error:
        _stop_all(1, f"error: {error}")
    _run_to_the_end(saved.config, lambda reporter: resume_training(saved, reporter))


def _repeat(config: TrainConfig, n_runs: int) -> None:
    """Train with one seed after the other, each into a folder of its own."""
    try:
        configs = repeated(config, n_runs)
    except ValueError as error:
        _stop_all(2, f"error: {error}")
    with _failures_told(config), join(config.device) as processes:
        processes.first_only(lambda: check_is_free(config.out))
        results = []
        for one in configs:
            results.append(_run_to_the_end(one, lambda reporter, one=one: run_training(one, reporter)))
            processes.first_only(lambda: write_summary(config.out, results))  # a later one may fail
        if is_first_process():
            for line in format_repeated(config.out, results):
                typer.echo(line)


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _run_to_the_end(config: TrainConfig, run: Callable[[Reporter], Result]) -> Result:
    """Run and show how it goes."""
    with _failures_told(config):
        reporter = make_reporter()
        try:
            with _sigterm_raises():
                result = run(reporter)
        finally:
            reporter.close()
    reporter.finish(result)
    return result


@contextmanager
def _failures_told(config: TrainConfig) -> Iterator[None]:
    """Say why a run stops, what is kept, and how to go on; of several processes one says it."""
    try:
        yield
    except FileExistsError as error:
        stop(2, f"error: {error}")
    except CheckpointMismatch as error:  # of --weights
        first, *rest = str(error).split("\n")
        stop(1, f"error: {first}", *rest)
    except ValueError as error:
        _stop_all(2, f"error: {error}")
    except (KeyboardInterrupt, _Terminated) as arrived:
        code, word = (130, "interrupted") if isinstance(arrived, KeyboardInterrupt) else (143, "terminated")
        if not is_first_process():
            raise typer.Exit(code) from None
        stop(code, f"{word}; {_what_is_kept(config.out)}{_how_to_go_on(config.out)}")
    except DivergedError as error:
        kept = f"error: {error}; {_what_is_kept(config.out)}; --resume would come to the same end"
        _stop_all(1, kept if is_first_process() else None)
    except OtherProcessError:
        _stop_all(1, None)
    except LostProcessError as error:
        kept = f"error: {error}; {_what_is_kept(config.out)}{_how_to_go_on(config.out)}"
        _stop_all(1, kept if is_first_process() else None)
    except (ResumeError, CheckpointError, TensorBoardError, BlockingIOError) as error:
        stop(1, f"error: {error}")
    except torch.OutOfMemoryError:
        hint = "the device is out of memory: try a smaller --batch-size, or --accumulate"
        stop(1, f"error: {hint}; {_what_is_kept(config.out)}{_how_to_go_on(config.out)}")
    except (DataError, OSError) as error:
        # Of several processes only the first one knows the folder, and it is told that this one is lost.
        started = is_first_process() and _is_started(config.out)
        stop(1, f"error: {error}" + (f"; {_what_is_kept(config.out)}{_how_to_go_on(config.out)}" if started else ""))
    except RuntimeError as error:
        if not (config.deterministic and "deterministic" in str(error)):
            raise
        stop(1, f"error: --deterministic refuses an operation: {' '.join(str(error).split())[:300]}")


def _stop_all(code: int, message: str | None) -> NoReturn:
    """Stop for a reason that all processes have: one of each machine says it; or, without a message, another one does.

    torchrun ends the others when the first one has ended, which should be one that has spoken.
    """
    if message is not None and is_first_on_machine():
        stop(code, message)
    time.sleep(QUIET)
    raise typer.Exit(code)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM end the block by _Terminated, as Ctrl-C ends it by KeyboardInterrupt."""
    process = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != process:  # one that reads images has the handler too, until torch gives it another
            os._exit(143)
        if hasattr(signal, "SIGCHLD"):
            # Those that read images may end by the same SIGTERM, of which torch would make an exception of its own.
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


def _how_to_go_on(out: Path) -> str:
    return f"; to go on: {command()} train --resume {shlex.quote(str(out))}" if _is_started(out) else ""


def _what_is_kept(out: Path) -> str:
    """Say which files of a run that did not reach its end are there."""
    if not _is_started(out):
        return "nothing was written"
    if not (out / "metrics.csv").is_file():
        return f"no epoch was finished, {out} keeps config.json only"
    epochs = (out / "metrics.csv").read_bytes().count(b"\n") - 1
    return f"{out} keeps the checkpoint, metrics and curves up to epoch {epochs}"
