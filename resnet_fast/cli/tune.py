"""`resnet-fast tune`."""

import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnet_fast.cli.app import choice_metavar, command, stop
from resnet_fast.cli.settings import option, parse_seconds
from resnet_fast.common.checks import check_choice, check_integer
from resnet_fast.models.registry import MODELS, check_name, check_stem
from resnet_fast.training.config import IMAGE_SIZE, TrainConfig, choose_device, choose_precision
from resnet_fast.tuning.options import BATCH_SIZES, CHOOSABLE, PRECISIONS, ROUNDS, TIME_BUDGET

if TYPE_CHECKING:
    import torch

    from resnet_fast.ops.choices import Environment
    from resnet_fast.ops.implementations import Problem
    from resnet_fast.tuning import Outcome


@command("Choose the fastest kernels for this GPU.", "tune --batch-size 512")
def tune(
    model: Annotated[str, option("model")] = TrainConfig.model,
    stem: Annotated[str | None, option("stem")] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            metavar="<int>",
            help=f"Images per step; may be given several times. [default: {', '.join(map(str, BATCH_SIZES))}]",
            show_default=False,
        ),
    ] = None,
    image_size: Annotated[int, typer.Option(help="Height and width of the images, in pixels.")] = IMAGE_SIZE,
    precision: Annotated[
        str,
        typer.Option(metavar=choice_metavar(PRECISIONS), help="Precision of the activations; auto: as in training."),
    ] = PRECISIONS[0],
    device: Annotated[str, typer.Option(help="Device: auto (a GPU), cuda or cuda:N.")] = TrainConfig.device,
    rounds: Annotated[int, typer.Option(help="Number of timed runs per candidate; the median counts.")] = ROUNDS,
    time_budget: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="Time limit, such as 90 (seconds), 15m or 2h; the largest operations come first."
        ),
    ] = TIME_BUDGET,
) -> None:
    """Measure which implementation of each operation is the fastest on this GPU, and keep the choice for training."""
    sizes = batch_size or BATCH_SIZES
    try:
        check_name(model)
        check_stem(model, stem or MODELS[model].stems[0])
        for size in sizes:
            check_integer("batch_size", size, 2)
        check_integer("rounds", rounds)
        check_integer("image_size", image_size)
        check_choice("precision", precision, PRECISIONS)
        end = time.monotonic() + parse_seconds(time_budget)
        chosen = choose_device(device)
    except ValueError as error:
        stop(2, f"error: {error}")

    from resnet_fast.ops.choices import SWITCH, environment_of, find_table, is_off, using
    from resnet_fast.tuning import measure, why_not
    from resnet_fast.tuning.candidates import candidates, has_choice
    from resnet_fast.tuning.report import TITLE, format_end, format_outcome, heading

    outcomes: list[Outcome] = []
    n_kept, longest = 0, 0.0
    try:
        if (reason := why_not(chosen)) is not None:
            raise ValueError(reason)
        precision = _resolve(precision, chosen)
        problems = [
            problem for problem in _problems(model, stem, sizes, image_size, precision) if has_choice(problem, chosen)
        ]
        environment = environment_of(chosen)
        path, in_table, why_not_used = find_table(environment)
        if path is None:
            raise ValueError("there is no cache folder for the table: set XDG_CACHE_HOME to a folder")
        problems.sort(key=lambda problem: problem in in_table)  # so that a second run continues the first
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # raise before anything is measured
            pass
    except ValueError as error:
        stop(2, f"error: {error}")
    except OSError as error:
        stop(1, f"error: no table can be written: {error}")
    _print(f"{model}, images of {image_size}x{image_size}, {precision}, {chosen}: {environment['gpu']}")
    _print(f"{len(problems)} problems, {rounds} timed runs of each candidate")
    if why_not_used:
        _print(f"The existing table is not used: {why_not_used}")
    try:
        for i, problem in enumerate(problems):
            begin = time.monotonic()
            if begin + longest > end and i:
                break
            if i == 0 or heading(problem) != heading(problems[i - 1]):
                print(f"\n{heading(problem)}\n{TITLE}")
            with using({**in_table, **{done.problem: done.measured.choice for done in outcomes if done.measured}}):
                outcome = measure(problem, candidates, chosen, rounds)
            outcomes.append(outcome)
            n_kept = _keep(path, environment, outcomes)  # at once, so that nothing is lost
            print("\n".join(format_outcome(outcome)), flush=True)
            longest = max(longest, time.monotonic() - begin)
    except KeyboardInterrupt:
        with suppress(OSError):
            n_kept = _keep(path, environment, outcomes)  # including a problem just measured
        stop(130, f"interrupted; {_kept(path, n_kept, len(problems))}")
    except (OSError, RuntimeError) as error:
        stop(1, f"error: {error}; {_kept(path, n_kept, len(problems))}")
    print()
    print("\n".join(format_end(outcomes)))
    if n_left := sum(problem not in in_table for problem in problems[len(outcomes) :]):
        _print(f"{n_left} problems are left after {time_budget}: run it again, or with a longer --time-budget.")
    print(f"Written: {path}")
    if is_off():
        _print(f"{SWITCH}=0 is set: training ignores the table until it is unset.")
    n_wrong = sum(len(outcome.wrong) for outcome in outcomes)
    if n_wrong:
        stop(1, f"error: {n_wrong} candidates are wrong and were not chosen; please report the lines above")


def _resolve(precision: str, device: "torch.device") -> str:
    """Return bf16 or fp16: the one given, or for auto the one that training uses."""
    if precision == "auto" and (precision := choose_precision(device)) not in CHOOSABLE:
        raise ValueError(
            f"precision must be {' or '.join(CHOOSABLE)} to tune, got {precision}, which training uses on {device}"
        )
    return precision


def _problems(model: str, stem: str | None, sizes: Sequence[int], image_size: int, precision: str) -> "list[Problem]":
    from resnet_fast.tuning import find_problems

    try:
        problems = find_problems(model, stem, sizes, image_size, precision)
    except RuntimeError as error:
        raise ValueError(f"{model} does not support images of {image_size}x{image_size} pixels: {error}") from None
    if not problems:
        raise ValueError(f"{model} must have a fused batch norm to tune, got none")
    return problems


def _keep(path: Path, environment: "Environment", outcomes: "list[Outcome]") -> int:
    """Write the choices measured so far; return their number."""
    from resnet_fast.ops.choices import add

    entries = {outcome.problem: outcome.measured.choice for outcome in outcomes if outcome.measured is not None}
    if entries:
        add(path, environment, entries)
    return len(entries)


def _print(text: str) -> None:
    from resnet_fast.tuning.report import fold

    print("\n".join(fold(text)))


def _kept(path: Path, n_kept: int, n_problems: int) -> str:
    if n_kept == 0:
        return "nothing was written"
    return f"{path} keeps {n_kept} of {n_problems} problems"
