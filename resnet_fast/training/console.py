"""The output of a run: colors and a live progress bar on a terminal, plain lines elsewhere, both in 80 columns."""

import os
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from resnet_fast.common.terminal import clean, clean_output, unfiltered
from resnet_fast.data import ImageDataset
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.metrics import EpochMetrics, Result
from resnet_fast.training.recipes import RECIPE_FIELDS, RECIPES
from resnet_fast.training.repeat import Spread
from resnet_fast.training.reporter import EpochProgress, Reporter
from resnet_fast.training.torchrun import command, format_train_on, is_first_process, world_size

FIRST_SILENCE = 8.0  # seconds without a line until progress is printed; doubled each time

WIDTH = 80  # columns
# Fields of a recipe that other lines of the opening show, or the table.
SHOWN = {"batch_size", "epochs", "schedule", "lr", "crop", "padding", "flip", "cutout", "trivial_augment"}
SHOWN |= {"random_erasing", "mixup", "cutmix"}
HEADER = "  epoch       lr  train loss  test loss  train acc  test acc       s  images/s"


def format_header(config: TrainConfig) -> str:
    """Return the header of the table; "val" replaces "test" for images held out of the training."""
    return HEADER.replace("test", " val") if config.holdout else HEADER


def format_row(metrics: EpochMetrics, n_epochs: int) -> str:
    """Return a row of the table, aligned with HEADER."""
    epoch = f"{metrics.epoch}/{n_epochs}"
    train, test = 100 * metrics.train_accuracy, 100 * metrics.test_accuracy
    return (
        f"{epoch:>7}  {metrics.lr:>7.2g}  {metrics.train_loss:>10.4f}  {metrics.test_loss:>9.4f}  "
        f"{train:>7.2f} %  {test:>6.2f} %  {metrics.seconds:>6.1f}  {metrics.images_per_second:>8,.0f}"
    )


def format_skipped(metrics: EpochMetrics) -> list[str]:
    """Return the line below an epoch's row with its number of skipped steps, if there were any."""
    count = metrics.skipped_steps
    if not count:
        return []
    return [f"{'':>7}  {count:,} step{'s' if count > 1 else ''} skipped: gradients overflowed in fp16"]


def format_progress(progress: EpochProgress, seconds_left: float) -> str:
    """Return loss, accuracy and speed of the running epoch, and the time left for the whole run."""
    so_far = f"loss {progress.loss:.3f}  {100 * progress.accuracy:.1f} %  {progress.images_per_second:,.0f} images/s"
    return f"{so_far}  {format_duration(seconds_left)} left"


def format_duration(seconds: float) -> str:
    """Return "52 s", "3 min 20 s" or "2 h 05 min"."""
    total = round(seconds)
    if total < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02} s"
    return f"{total // 3600} h {total % 3600 // 60:02} min"


def format_start(config: TrainConfig, dataset: ImageDataset) -> list[str]:
    """Return the opening lines: network, data set, device, recipe, augmentation and notes."""
    n_classes, n_train, n_test = len(dataset.classes), len(dataset.train), len(dataset.test)
    network = config.model if config.backend == "fused" else f"{config.model}, {config.backend}"
    held_out = " (held out)" if config.holdout else ""
    n_processes = world_size()
    device = f"{n_processes} x {config.device}" if n_processes > 1 else config.device
    return [
        *textwrap.wrap(
            f"{network} ({config.stem} stem) on {config.dataset}: "
            f"{n_train:,} + {n_test:,}{held_out} images, {n_classes} classes",
            WIDTH,
            subsequent_indent="  ",
        ),
        f"{device}, {config.precision}, recipe {config.recipe}: batch {config.batch_size}, {config.schedule}, "
        f"lr {config.lr:g}, seed {config.seed}",
        *format_changes(config),
        *format_augmentation(config, dataset),
        *(textwrap.wrap(f"frozen: {config.freeze.replace(',', ', ')}", WIDTH) if config.freeze else []),
        *(f"note: {note}" for note in (*dataset.notes, *format_warnings(config))),
        "",
    ]


def format_changes(config: TrainConfig) -> list[str]:
    """Return the lines that name the options by which the run differs from its recipe, if no other line shows them."""
    recipe, texts = RECIPES[config.recipe], []
    for name in RECIPE_FIELDS:
        value = getattr(config, name)
        if name not in SHOWN and value != getattr(recipe, name):
            option = name.replace("_", "-")
            text = value if isinstance(value, str) else f"{value:g}"
            texts.append(f"{'' if value else 'no-'}{option}" if isinstance(value, bool) else f"{option} {text}")
    changes = f"unlike the recipe: {', '.join(texts)}"
    return textwrap.wrap(changes, WIDTH, subsequent_indent="  ", break_on_hyphens=False) if texts else []


def format_augmentation(config: TrainConfig, dataset: ImageDataset) -> list[str]:
    """Return the lines that name the augmentations in use."""
    crop = dataset.crop_padding if config.crop is None else config.crop
    in_use = {
        f"crop {crop} ({config.padding})": crop,
        f"flip {config.flip}": config.flip != "none",
        f"cutout {config.cutout}": config.cutout,
        "trivial-augment": config.trivial_augment,
        f"random-erasing {config.random_erasing:g}": config.random_erasing,
        f"mixup {config.mixup:g}": config.mixup,
        f"cutmix {config.cutmix:g}": config.cutmix,
    }
    names = ", ".join(text for text, is_on in in_use.items() if is_on) or "none"
    return textwrap.wrap(f"augmentation: {names}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def format_warnings(config: TrainConfig) -> list[str]:
    """Return a note on each setting that has no effect or is slow on this device."""
    notes = []
    if config.sync_bn and world_size() == 1:
        notes.append("--sync-bn has no effect with a single process")
    if config.precision == "fp16" and config.device == "cpu":
        notes.append("--precision fp16 is several times slower than fp32 on a CPU")
    return notes


def format_end(result: Result) -> list[str]:
    """Return the summary: the last epoch's accuracy, times and files."""
    n_epochs, config = len(result.history), result.config
    kind = "validation" if config.holdout else "test"
    lines = ["", f"{100 * result.test_accuracy:.2f} % {kind} accuracy after epoch {n_epochs} (the last, not the best)"]
    if result.mirrored_accuracy is not None:
        lines.append(f"{100 * result.mirrored_accuracy:.2f} % with each image and its mirror image (flip TTA)")
    lines += [
        f"{format_duration(result.train_seconds)} of training, {result.images_per_second:,.0f} images/s; "
        f"{format_duration(result.seconds)} with evaluation and files",
        "checkpoint.pt, metrics.csv, config.json, curves.png, confusion.png, mistakes.png",
        f"in {config.out}",
    ]
    if n_epochs < config.epochs:
        lines.append(
            f"the time budget ended the run before epoch {n_epochs + 1} of {config.epochs}; "
            f"to resume: {command()} train --resume {shlex.quote(str(config.out))}"
        )
    return lines


def format_repeated(out: Path, results: Sequence[Result]) -> list[str]:
    """Return the summary of the runs with several seeds."""
    accuracy = Spread.of([100 * result.test_accuracy for result in results])
    lines = ["", f"{len(results)} runs: {accuracy.mean:.2f} ± {accuracy.std:.2f} % after the last epoch (mean ± std)"]
    mirrored = [100 * result.mirrored_accuracy for result in results if result.mirrored_accuracy is not None]
    if mirrored:
        spread = Spread.of(mirrored)
        lines.append(f"{spread.mean:.2f} ± {spread.std:.2f} % with each image and its mirror image (flip TTA)")
    seconds = Spread.of([result.train_seconds for result in results])
    return [*lines, f"{seconds.mean:.1f} ± {seconds.std:.1f} s of training", f"summary.csv: {out}"]


def format_resumed(n_done: int, config: TrainConfig) -> list[str]:
    """Return the lines between the rows of the resumed run and the new ones."""
    if n_done == config.epochs:
        return ["nothing to resume: the run is finished", format_train_on(config.out)]
    return [f"resumed after epoch {n_done}" if n_done else "resumed from the beginning, because no epoch was finished"]


def wants_live_output(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class PlainReporter(Reporter):
    """Prints a line per epoch, and progress in long epochs, without control codes: for files, pipes and logs."""

    def note(self, line: str) -> None:
        print(clean(line), flush=True)

    def start(self, config: TrainConfig, dataset: ImageDataset) -> None:
        self.config = config
        self.first: int | None = None  # first epoch trained by this process
        self.silence = FIRST_SILENCE
        for line in [*format_start(config, dataset), format_header(config)]:
            self.note(line)

    def resume(self, history: Sequence[EpochMetrics]) -> None:
        for metrics in history:
            self.end_epoch(metrics)
        for line in format_resumed(len(history), self.config):
            self.note(line)

    def start_epoch(self, epoch: int, n_steps: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.began, self.spoke = epoch, now, now
        self.epoch, self.n_steps = epoch, n_steps

    def step(self, done: int, progress: EpochProgress | None) -> None:
        now = time.monotonic()
        if progress is None or now - self.spoke < self.silence:
            return
        so_far = format_progress(progress, self.seconds_left(done))
        self.note(f"{f'{self.epoch}/{self.config.epochs}':>7}  {done}/{self.n_steps} steps  {so_far}")
        self.spoke, self.silence = now, 2 * self.silence

    def seconds_left(self, done: int) -> float:
        """Return the seconds left for the whole run, at its speed so far, including evaluations and files."""
        since_start = (self.epoch - (self.first or 1)) * self.n_steps + done
        to_come = (self.config.epochs - self.epoch + 1) * self.n_steps - done
        return (time.monotonic() - self.began) / since_start * to_come

    def end_epoch(self, metrics: EpochMetrics) -> None:
        for line in [format_row(metrics, self.config.epochs), *format_skipped(metrics)]:
            self.note(line)
        self.spoke = time.monotonic()

    def finish(self, result: Result) -> None:
        for line in format_end(result):
            self.note(line)

    def close(self) -> None:
        """Restore the terminal; may be called more than once."""


class LiveReporter(PlainReporter):
    """Prints the table row by row, above a progress bar of the running epoch."""

    def __init__(self) -> None:
        self.console = Console(file=unfiltered(sys.stdout), highlight=False)
        self.cleaning = ExitStack()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, complete_style="dark_orange", finished_style="dark_orange"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[so_far]}"),
            console=self.console,
            transient=True,
            expand=True,
        )

    def note(self, line: str) -> None:
        self._print(line, "dim")

    def start(self, config: TrainConfig, dataset: ImageDataset) -> None:
        self.config = config
        self.first: int | None = None  # first epoch trained by this process
        first, *rest = format_start(config, dataset)
        self._print(first, "bold")
        for line in rest:
            self._print(line, "dim")
        self._print(format_header(config), "bold")
        self.task = self.progress.add_task("", total=None, visible=False, so_far="")
        self.progress.start()
        self.cleaning.enter_context(clean_output())  # around the console's own redirection

    def start_epoch(self, epoch: int, n_steps: int) -> None:
        super().start_epoch(epoch, n_steps)
        self.progress.reset(
            self.task, total=n_steps, visible=True, description=f"epoch {epoch}/{self.config.epochs}", so_far=""
        )

    def step(self, done: int, progress: EpochProgress | None) -> None:
        if progress is None:
            self.progress.update(self.task, completed=done)
        else:
            self.progress.update(self.task, completed=done, so_far=format_progress(progress, self.seconds_left(done)))

    def end_epoch(self, metrics: EpochMetrics) -> None:
        for line in [format_row(metrics, self.config.epochs), *format_skipped(metrics)]:
            self._print(line)

    def finish(self, result: Result) -> None:
        self.close()
        blank, accuracy, *rest = format_end(result)
        self._print(blank)
        self._print(accuracy, "bold green")
        for line in rest:
            self._print(line)

    def close(self) -> None:
        """Restore the terminal; may be called more than once."""
        self.cleaning.close()
        self.progress.stop()

    def _print(self, line: str, style: str | None = None) -> None:
        # Without markup, because a folder may be called [red]. Soft wrapping keeps paths whole for copying.
        self.console.print(clean(line), style=style, markup=False, soft_wrap=True)


class SilentReporter(Reporter):
    """Prints nothing: for all processes except the first."""

    def finish(self, result: Result) -> None:
        """Print nothing."""

    def close(self) -> None:
        """Leave nothing open."""


def make_reporter() -> PlainReporter | LiveReporter | SilentReporter:
    """Return the reporter for standard output; all processes except the first get a silent one."""
    if not is_first_process():
        return SilentReporter()
    return LiveReporter() if wants_live_output(sys.stdout) else PlainReporter()
