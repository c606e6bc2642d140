"""`resnet-fast train`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from resnet_fast.cli.app import command, stop, stop_all
from resnet_fast.cli.settings import parse_seconds, with_settings
from resnet_fast.common.checks import check_path
from resnet_fast.training.config import MOVABLE, SETTINGS, TrainConfig
from resnet_fast.training.paths import check_is_free, find_resumable
from resnet_fast.training.repeat import check_seeds
from resnet_fast.training.torchrun import format_train_on, world_size

# The settings that may change on resuming: where the data are and what computes, not what is computed.
BESIDE_RESUME = tuple(name for name in MOVABLE if name != "out")


def _flags(names: Iterable[str]) -> str:
    return ", ".join(SETTINGS[name].flag if name in SETTINGS else f"--{name}" for name in names)


@command("Train a network, or resume a run.", "train --dataset cifar10 --out runs/first")
@with_settings
def train(
    context: typer.Context,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_FOLDER",
            help="Resume an interrupted run after its last finished epoch, given its folder or a checkpoint in it. The "
            f"settings are kept; only these options may be added: {_flags(BESIDE_RESUME)}.",
            show_default=False,
            rich_help_panel="Run",
        ),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of runs, with --seed, --seed + 1, …; reports mean and standard deviation.",
            rich_help_panel="Run",
        ),
    ] = 1,
    **settings: Any,
) -> None:
    """Train a network, and write config.json, metrics.csv, curves.png, checkpoint.pt and more to a run folder.

    On several GPUs: torchrun --nproc-per-node 8 -m resnet_fast.cli train …
    """
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        if "time_budget" in given:
            given["time_budget"] = parse_seconds(given["time_budget"])
        if repeat > 1:
            check_seeds(given.get("seed", TrainConfig.seed), repeat)
        if resume is None:
            if "out" in given and world_size() == 1:  # else the first process checks, and tells the others
                check_is_free(check_path("out", given["out"]))
            config = TrainConfig(**given)
    except ValueError as error:
        stop_all(2, f"error: {error}")
    except OSError as error:
        stop(2 if isinstance(error, FileExistsError) else 1, f"error: {error}")
    if resume is not None:
        _refuse(given, repeat, resume)

    from resnet_fast.cli import run

    if resume is not None:
        run.run_on(resume, given)
    elif repeat > 1:
        run.run_repeated(config, repeat)
    else:
        run.run_once(config)


def _refuse(given: dict[str, Any], repeat: int, path: Path) -> None:
    """Stop unless the run in `path` can be resumed with these settings."""
    refused = [name for name in given if name not in BESIDE_RESUME] + (["repeat"] if repeat > 1 else [])
    if refused:
        train_on = f"; {format_train_on(path)}" if "epochs" in refused else ""
        stop_all(
            2,
            f"error: --resume keeps the settings of the run; only {_flags(BESIDE_RESUME)} may be given as well, "
            f"got {_flags(refused)}{train_on}",
        )
    try:
        for name, value in given.items():
            SETTINGS[name].check(value)
        find_resumable(path)
    except ValueError as error:
        stop_all(2, f"error: {error}")
    except OSError as error:  # such as a name that is too long
        stop_all(1, f"error: {error}")
