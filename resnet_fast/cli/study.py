"""`resnet-fast study skip`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnet_fast.cli.app import Command, app, stop
from resnet_fast.cli.settings import option
from resnet_fast.common.checks import check_path
from resnet_fast.study import full_study, small_study
from resnet_fast.training.paths import check_is_free

if TYPE_CHECKING:
    from resnet_fast.study import Trained
    from resnet_fast.study.folder import StudyFolder

study_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Experiments on what makes networks train.")
app.add_typer(study_app, name="study", short_help="Experiments on what makes networks train.")


@study_app.callback()
def study() -> None:
    """Experiments on what makes networks train."""  # with a callback the one command keeps its name


@study_app.command(
    cls=Command, short_help="Train with and without skip connections.", epilog="Example: resnet-fast study skip"
)
def skip(
    full: Annotated[
        bool,
        typer.Option("--full", help="The experiment of the paper: CIFAR-10, 16 channels, 64k iterations; for a GPU."),
    ] = False,
    seeds: Annotated[int, typer.Option(help="Number of runs per network, with --seed, --seed + 1, …")] = 3,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of each run. [default: 12; --full: 164]", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="First seed, of the weights and the order of the images.")] = 0,
    device: Annotated[str, option("device")] = "auto",
    data_dir: Annotated[Path, typer.Option(help="Folder to which CIFAR-10 is downloaded, with --full.")] = Path("data"),
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the files, new or empty. [default: runs/skip-<dataset>-<time>]", show_default=False
        ),
    ] = None,
) -> None:
    """Train plain-20, plain-56, ResNet-20 and ResNet-56 to show the effect of skip connections.

    Plots training error, test error and the gradient of each layer (skip.png), and says whether depth hurts. Without
    --full, the images are digits of 16x16 pixels, the first stage has 8 channels, and a CPU takes minutes.
    """
    make = full_study if full else small_study
    try:
        if out is not None:
            check_is_free(check_path("out", out))
        settings = make(n_seeds=seeds, epochs=epochs, seed=seed, device=device, data_dir=data_dir, out=out)
    except (ValueError, FileExistsError) as error:
        stop(2, f"error: {error}")
    except OSError as error:
        stop(1, f"error: {error}")

    from resnet_fast.data import DataError
    from resnet_fast.data.torchvision_sets import WITHOUT_NETWORK
    from resnet_fast.study import format_table, format_verdict, run_study
    from resnet_fast.study.folder import NAMES, StudyFolder
    from resnet_fast.training import DivergedError
    from resnet_fast.training.prepare import augmentation_of

    folder, done, n_runs = None, [], 0
    try:
        n_runs = len(settings.seeds) * len(settings.networks)
        dataset = settings.load()
        folder = StudyFolder(settings, dataset, augmentation_of(settings.config, dataset))
        folder.start()
        print(f"{folder.title}\n{len(dataset.train):,} training and {len(dataset.test):,} test images\n")
        for trained in run_study(settings, dataset):
            done.append(trained)
            folder.write_tables(done)
            print(format_run(trained), flush=True)
        folder.write_picture(done)
    except (ValueError, FileExistsError) as error:
        stop(2, f"error: {error}")
    except KeyboardInterrupt:
        stop(130, f"interrupted; {_what_is_kept(folder, done, n_runs)}")
    except (DataError, DivergedError, OSError) as error:
        message = str(error).replace(WITHOUT_NETWORK, "Without --full no network is needed.")
        stop(1, f"error: {message}" + (f"; {_what_is_kept(folder, done, n_runs)}" if folder else ""))
    rows = [row for trained in done for row in trained.epochs]
    print()
    print("\n".join(format_table(rows, settings.networks)))
    over = "mean and standard deviation over the seeds" if seeds > 1 else "one seed"
    print(f"(after the last epoch, {over})\n")
    print("\n".join(format_verdict(rows, settings.networks)))
    print(f"\n{', '.join(NAMES)}: {folder.out}")


def format_run(trained: "Trained") -> str:
    """Return the line about a trained network."""
    last, seconds = trained.epochs[-1], sum(row.seconds for row in trained.epochs)
    return (
        f"{trained.network.name:<10}  seed {trained.seed:<4} training error {100 * last.train_error:6.2f} %  "
        f"test error {100 * last.test_error:6.2f} %  {seconds:7.1f} s"
    )


def _what_is_kept(folder: "StudyFolder | None", done: "list[Trained]", n_runs: int) -> str:
    """Return which files an unfinished study has left."""
    if folder is None or not os.path.isfile(folder.out / "config.json"):
        return "nothing was written"
    if not done:
        return f"no network was finished, {folder.out} keeps config.json only"
    last = done[-1]
    return (
        f"{folder.out} keeps skip.csv and gradients.csv up to {last.network.name}, seed {last.seed}: "
        f"{len(done)} of {n_runs} runs"
    )
