"""The command line's frame, and what its commands share."""

import io
import sys
from typing import NoReturn

import typer

# Plain help and errors: rich would take the brackets of "[default: …]" for markup, and frame a one-line error.
app = typer.Typer(name="resnet-fast", add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def main() -> None:
    """Fast ResNets for images like CIFAR-10."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of classes and files hold any characters, and not every terminal or log takes them.
        sys.stdout.reconfigure(errors="backslashreplace")


def choices(names: object) -> str:
    return "|".join(names)  # type: ignore[arg-type]


def stop(code: int, message: str) -> NoReturn:
    typer.echo(f"resnet-fast: {message}", err=True)
    raise typer.Exit(code)
