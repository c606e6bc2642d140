"""`resnet-fast profile`."""

from pathlib import Path
from typing import Annotated

import typer

from resnet_fast.cli.app import command, stop
from resnet_fast.cli.settings import option
from resnet_fast.common.checks import check_path
from resnet_fast.profiling import profile_config
from resnet_fast.training.config import IMAGE_SIZE, TrainConfig
from resnet_fast.training.paths import check_is_free


@command("Show where the time of a training step goes.", "profile --model resnet18 --batch-size 512")
def profile(
    model: Annotated[str, option("model")] = TrainConfig.model,
    stem: Annotated[str | None, option("stem")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per step. [default: 128; on a CPU 32]", show_default=False)
    ] = None,
    image_size: Annotated[int, typer.Option(help="Height and width of the images, in pixels.")] = IMAGE_SIZE,
    precision: Annotated[str, option("precision")] = TrainConfig.precision,
    device: Annotated[str, option("device")] = TrainConfig.device,
    optimizer: Annotated[
        str, option("optimizer", "Optimizer of the step; muon shows the cost of Newton-Schulz. [default: sgd]")
    ] = "sgd",
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Number of profiled steps, averaged. [default: 10]", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the files, new or empty. [default: runs/profile-<model>-<time>]", show_default=False
        ),
    ] = None,
) -> None:
    """Show where the time of a training step goes, eager and fused: tables, profile.csv, profile.png and traces."""
    try:
        if out is not None:
            check_is_free(check_path("out", out))
        config = profile_config(model, stem, batch_size, precision, device, image_size, out, optimizer)
    except (ValueError, OSError) as error:
        stop(2, f"error: {error}")

    import torch

    from resnet_fast.profiling import ProfileError, profile_steps, write_files
    from resnet_fast.profiling.report import Report

    report = Report(config, steps)
    report.start()
    try:
        profiles = profile_steps(config, steps)
        report.show(profiles)
        names = write_files(config.out, profiles, config)
    except KeyboardInterrupt:
        # Every file here is complete; unfinished ones were deleted.
        kept = sorted(path.name for path in config.out.iterdir()) if config.out.is_dir() else []
        stop(130, f"interrupted; {config.out} keeps {', '.join(kept)}" if kept else "interrupted; nothing was written")
    except (ProfileError, torch.OutOfMemoryError, OSError) as error:
        stop(1, f"error: {error}")
    report.finish(config.out, names)
