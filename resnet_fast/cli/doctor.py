"""`resnet-fast doctor`."""

from typing import TYPE_CHECKING, Annotated

import typer

from resnet_fast.cli.app import command, stop
from resnet_fast.cli.settings import option
from resnet_fast.training.config import TrainConfig, find_device

if TYPE_CHECKING:
    from resnet_fast.doctor import Finding


@command("Show what runs on this machine, and check its results.", "doctor")
def doctor(
    device: Annotated[str, option("device")] = TrainConfig.device,
) -> None:
    """Show what runs on this machine and why, check its results, and say what to do if something is missing."""
    try:
        find_device(device)  # before torch is imported
    except ValueError as error:
        stop(2, f"error: {error}; resnet-fast doctor without --device shows the devices")

    from resnet_fast.doctor import diagnose, exit_code, format_end, format_finding

    def show(finding: "Finding") -> None:
        for line in format_finding(finding):
            print(line, flush=True)  # the next finding may take seconds

    try:
        findings = diagnose(device, show)
    except KeyboardInterrupt:
        stop(130, "interrupted")
    print(f"\n{format_end(findings)}")
    raise typer.Exit(exit_code(findings))
