"""The typer app, and the helpers that its commands share."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from resnet_fast.cli.extra import stop_without
from resnet_fast.common.terminal import clean, clean_output
from resnet_fast.training.torchrun import is_first_on_machine

QUIET = 5  # seconds for which a process lets another one report the error


class CleanGroup(TyperGroup):
    """A group in which commands and typer itself write no control characters."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with clean_output():
            try:
                return super().main(*args, **kwargs)
            except ModuleNotFoundError as error:
                stop_without(error)


class Command(TyperCommand):
    """A command whose help lists its options by `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                title = getattr(parameter, "rich_help_panel", None) or ("Arguments" if is_argument else "Options")
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


# Plain help and errors: rich would read "[default: …]" as markup, and draw a frame around a one-line error.
app = typer.Typer(name="resnet-fast", cls=CleanGroup, add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def main() -> None:
    """Fast ResNets for images like CIFAR-10."""


def command(summary: str, example: str, name: str | None = None) -> Callable[[Any], Any]:
    """Register a function as a command; `summary` is its line in the list of commands, at most 65 characters."""
    return app.command(name, cls=Command, short_help=summary, epilog=f"Example: resnet-fast {example}")


def choice_metavar(names: object) -> str:
    return "|".join(names)  # type: ignore[arg-type]


def complain(line: str) -> None:
    """Write one line to standard error, without the line breaks of names in it."""
    typer.echo(clean(line.replace("\n", " ")), err=True)


def stop(code: int, message: str, *more: str) -> NoReturn:
    """End the command with a message of one or more lines.

    Raises:
        BrokenPipeError: it is the error to report: `| head` closed standard output. Typer then ends the command.
    """
    if isinstance(sys.exception(), BrokenPipeError):
        raise
    for line in (f"resnet-fast: {message}", *more):
        complain(line)
    raise typer.Exit(code)


@contextmanager
def refusals(*failures: type[Exception]) -> Iterator[None]:
    """Stop on an error, with its message: exit code 2 for a ValueError, 1 for an OSError or one of `failures`."""
    try:
        yield
    except ValueError as error:
        stop(2, f"error: {error}")
    except (*failures, OSError) as error:  # such as a name that is too long
        stop(1, f"error: {error}")


def stop_all(code: int, message: str | None) -> NoReturn:
    """Stop for a reason that all processes share; one process per machine prints it, or none without a message.

    torchrun ends all processes once the first one has ended, so those that print nothing wait.
    """
    if message is not None and is_first_on_machine():
        stop(code, message)
    time.sleep(QUIET)
    raise typer.Exit(code)
