"""`resnet-fast train`."""

import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from resnet_fast.cli.app import app, choices, stop
from resnet_fast.data import DATASETS, DataError
from resnet_fast.training import (
    MODELS,
    RECIPES,
    DivergedError,
    Reporter,
    Result,
    ResumeError,
    TrainConfig,
    load_run,
)
from resnet_fast.training import resume as resume_training
from resnet_fast.training import train as run_training
from resnet_fast.training.config import PRECISIONS, STEMS
from resnet_fast.training.console import make_reporter
from resnet_fast.training.schedule import SCHEDULES


def _by_dataset(field: str) -> str:
    """Return "[default: 30; digits: 6]": the value for cifar10, then those that differ."""
    usual = getattr(RECIPES["cifar10"], field)
    others = [f"; {name}: {getattr(r, field):g}" for name, r in RECIPES.items() if getattr(r, field) != usual]
    return f"[default: {usual:g}{''.join(others)}]"


def _option_names(parameters: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in parameters)


# What a run that goes on may be told: where the data are and what computes, not what is computed.
BESIDE_RESUME = ("device", "data_dir", "workers")


@app.command()
def train(
    context: typer.Context,
    model: Annotated[str, typer.Option(metavar=choices(MODELS), help="The network.")] = TrainConfig.model,
    stem: Annotated[
        str, typer.Option(metavar=choices(STEMS), help="cifar: 3x3, no pooling; imagenet: 7x7 stride 2, then pooling.")
    ] = TrainConfig.stem,
    dataset: Annotated[
        str,
        typer.Option(
            metavar=choices(DATASETS),
            help="cifar10 downloads itself; digits needs no network; folder is --data-dir with train/ and test/.",
        ),
    ] = TrainConfig.dataset,
    data_dir: Annotated[
        Path, typer.Option(help="Where CIFAR-10 is or goes to, or the folder of images.")
    ] = TrainConfig.data_dir,
    image_size: Annotated[
        int, typer.Option(help="Pixels to which the images of a folder are resized.")
    ] = TrainConfig.image_size,
    epochs: Annotated[
        int | None, typer.Option(help=f"Passes over the training images. {_by_dataset('epochs')}", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Images per step. {_by_dataset('batch_size')}", show_default=False)
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help=f"Peak learning rate. {_by_dataset('lr')}", show_default=False)
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="Mirror half of the training images. [default: flip; digits: no-flip]"),
    ] = None,
    schedule: Annotated[
        str, typer.Option(metavar=choices(SCHEDULES), help="How the rate moves.")
    ] = TrainConfig.schedule,
    weight_decay: Annotated[float, typer.Option(help="Of every parameter.")] = TrainConfig.weight_decay,
    momentum: Annotated[float, typer.Option(help="Nesterov's.")] = TrainConfig.momentum,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = TrainConfig.seed,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = TrainConfig.device,
    precision: Annotated[
        str, typer.Option(metavar=choices(PRECISIONS), help="auto: bf16 where the processor computes in it.")
    ] = TrainConfig.precision,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes reading a folder. [default: one per processor, at most 4]", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder, new or empty. [default: runs/<dataset>-<model>-<time>]", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_FOLDER",
            help="Go on with a run that was stopped, after its last finished epoch, or with a checkpoint named in its "
            f"folder. Its settings stay; beside this only {_option_names(BESIDE_RESUME)} may be given.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a network; write config.json, metrics.csv, curves.png and checkpoint.pt to a run folder."""
    if resume is not None:
        _resume(context, resume)
        return
    # Where these are None, TrainConfig fills in what suits the data set and the machine.
    left_open: dict[str, Any] = dict(epochs=epochs, batch_size=batch_size, lr=lr, workers=workers, out=out)
    try:
        config = TrainConfig(
            model=model,
            stem=stem,
            dataset=dataset,
            data_dir=data_dir,
            image_size=image_size,
            flip=flip,
            schedule=schedule,
            weight_decay=weight_decay,
            momentum=momentum,
            seed=seed,
            device=device,
            precision=precision,
            **left_open,
        )
    except ValueError as error:
        stop(2, f"error: {error}")
    _run_to_the_end(config, lambda reporter: run_training(config, reporter))


def _resume(context: typer.Context, path: Path) -> None:
    """Go on with the run in `path`."""
    given = [
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    refused = [name for name in given if name not in (*BESIDE_RESUME, "resume")]
    if refused:
        stop(
            2,
            f"error: --resume keeps the settings of the run; beside it only {_option_names(BESIDE_RESUME)} may be "
            f"given, got {_option_names(refused)}",
        )
    try:
        saved = load_run(path, **{name: context.params[name] for name in given if name in BESIDE_RESUME})
    except ValueError as error:
        stop(2, f"error: {error}")
    except (ResumeError, OSError) as error:
        stop(1, f"error: {error}")
    _run_to_the_end(saved.config, lambda reporter: resume_training(saved, reporter))


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _run_to_the_end(config: TrainConfig, run: Callable[[Reporter], Result]) -> None:
    """Run, show how it goes, and when it stops say why, what is kept, and how to go on."""
    reporter = make_reporter()
    how = f"to go on: resnet-fast train --resume {shlex.quote(str(config.out))}"
    try:
        try:
            with _sigterm_raises():
                result = run(reporter)
        finally:
            reporter.close()
    except FileExistsError as error:
        stop(2, f"error: {error}")
    except (KeyboardInterrupt, _Terminated) as arrived:
        code, word = (130, "interrupted") if isinstance(arrived, KeyboardInterrupt) else (143, "terminated")
        stop(code, f"{word}; {_what_is_kept(config.out)}" + (f"; {how}" if _is_started(config.out) else ""))
    except DivergedError as error:
        stop(1, f"error: {error}; {_what_is_kept(config.out)}; --resume would come to the same end")
    except (ResumeError, BlockingIOError) as error:
        stop(1, f"error: {error}")
    except (DataError, OSError) as error:
        stop(1, f"error: {error}" + (f"; {_what_is_kept(config.out)}; {how}" if _is_started(config.out) else ""))
    reporter.finish(result)


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
    return (out / "config.json").exists()


def _what_is_kept(out: Path) -> str:
    """Say which files of a run that did not reach its end are there."""
    if not _is_started(out):
        return "nothing was written"
    if not (out / "metrics.csv").exists():
        return f"no epoch was finished, {out} keeps config.json only"
    epochs = len((out / "metrics.csv").read_text().splitlines()) - 1
    return f"{out} keeps the checkpoint, metrics and curves up to epoch {epochs}"
