"""The output of `resnet-fast profile`: tables that fit 80 columns, colored on a terminal and plain elsewhere."""

import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resnet_fast.common.terminal import clean, unfiltered
from resnet_fast.ops import why_not_triton
from resnet_fast.profiling.categories import CATEGORIES, CONVOLUTION, LAYOUT, LOSS, NORM, OPTIMIZER, OTHER
from resnet_fast.profiling.measure import N_STEPS, WARM_UP
from resnet_fast.profiling.picture import format_ms
from resnet_fast.profiling.recording import Part, StepProfile, rest_of
from resnet_fast.training.config import TrainConfig
from resnet_fast.training.console import wants_live_output

WIDTH = 80
N_ROWS = 12
SHORT = {CONVOLUTION: "conv", NORM: "norm", LAYOUT: "layout", OPTIMIZER: "optim", LOSS: "loss", OTHER: "other"}


class Report:
    """Prints to standard output.

    Args:
        config: the step that is profiled.
        n_steps: number of profiled steps of each provider; None: 10.
    """

    def __init__(self, config: TrainConfig, n_steps: int | None) -> None:
        self.config, self.device = config, torch.device(config.device)
        self.n_steps = N_STEPS if n_steps is None else n_steps
        live = wants_live_output(sys.stdout)
        self.console = Console(
            file=unfiltered(sys.stdout) if live else None,
            highlight=False,
            width=WIDTH,
            force_terminal=live,
            color_system="auto" if live else None,
            emoji=False,
        )

    def start(self) -> None:
        """Print what is about to be profiled."""
        config = self.config
        size = f"{config.image_size}x{config.image_size}"
        self._print(f"One training step of {config.model} ({config.stem} stem, {size} images)", "bold")
        self._print(f"{config.device}, {config.precision}, batch {config.batch_size}")
        n_warm = WARM_UP[self.device.type]
        self._print(f"eager and fused: the first step is checked, {n_warm} more warm up, {self.n_steps} are profiled")

    def show(self, profiles: Sequence[StepProfile]) -> None:
        """Print both tables and remarks on them."""
        self._print("")
        self.console.print(self._categories(profiles))
        self._print("")
        self.console.print(self._largest(profiles))
        self._print("")
        for line in self._remarks(profiles):
            self._print(line)

    def finish(self, out: Path, names: Sequence[str]) -> None:
        """Print the names of the files written."""
        self._print("")
        self._print("Written (open the traces in https://ui.perfetto.dev):")
        self._print(", ".join(names))
        self._print(str(out))

    def _categories(self, profiles: Sequence[StepProfile]) -> Table:
        table = self._table("milliseconds per step", profiles, share=True)
        for category in (*CATEGORIES, rest_of(self.device)):
            ms = [profile.ms_of(category) for profile in profiles]
            launches = [profile.calls_of(category) for profile in profiles]
            style = "bold" if category == NORM else None
            table.add_row(category, *self._cells(profiles, ms, launches, share=True), style=style)
        total = [profile.ms for profile in profiles]
        launches = [sum(part.calls for part in profile.parts) for profile in profiles]
        table.add_section()
        table.add_row("profiled step", *self._cells(profiles, total, launches, share=True), style="bold")
        return table

    def _largest(self, profiles: Sequence[StepProfile]) -> Table:
        rows: defaultdict[tuple[str, str], list[list[float]]] = defaultdict(lambda: [[0.0, 0.0] for _ in profiles])
        for i, profile in enumerate(profiles):
            for part in profile.parts:
                if part.category in SHORT:
                    sums = rows[SHORT[part.category], label(part)][i]
                    sums[0] += part.ms
                    sums[1] += part.calls
        what = "operator" if self.device.type == "cpu" else "kernel"
        table = self._table(f"largest {what}s, ms per step", profiles, share=False)
        by_size = sorted(rows.items(), key=lambda row: -max(ms for ms, _ in row[1]))
        for (short, name), sums in by_size[:N_ROWS]:
            ms, launches = ([pair[i] for pair in sums] for i in (0, 1))
            table.add_row(f"{short:<6} {name}", *self._cells(profiles, ms, launches, share=False))
        return table

    def _table(self, title: str, profiles: Sequence[StepProfile], share: bool) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", expand=True)
        table.add_column(title, no_wrap=True, overflow="ellipsis", ratio=1)
        for profile in profiles:
            table.add_column(profile.provider, justify="right", no_wrap=True)
            if share:
                table.add_column("%", justify="right", no_wrap=True)
        table.add_column("difference", justify="right", no_wrap=True)
        if self.device.type != "cpu":
            table.add_column("launches", justify="right", no_wrap=True)
        return table

    def _cells(
        self, profiles: Sequence[StepProfile], ms: Sequence[float], launches: Sequence[float], share: bool
    ) -> list[str | Text]:
        longest = max(profile.ms for profile in profiles)
        cells: list[str | Text] = []
        for profile, value in zip(profiles, ms, strict=True):
            cells.append(format_ms(value, longest))
            if share:
                cells.append(f"{100 * value / profile.ms:.1f}")
        text = format_ms(ms[1] - ms[0], longest)
        zero = float(text) == 0
        sign = "" if zero or text.startswith("-") else "+"
        # On a CPU a difference is noise, which a color would emphasize.
        color = "" if zero or self.device.type == "cpu" else "red" if sign else "green"
        cells.append(Text(f"{sign}{text.lstrip('-') if zero else text}", style=color))
        if self.device.type != "cpu":
            cells.append(" / ".join(f"{value:.0f}" for value in launches) if any(launches) else "")
        return cells

    def _remarks(self, profiles: Sequence[StepProfile]) -> list[str]:
        longest = max(profile.unprofiled_ms for profile in profiles)
        times = [f"{profile.provider} {format_ms(profile.unprofiled_ms, longest)} ms" for profile in profiles]
        lines = [f"A step without the profiler's overhead: {', '.join(times)}"]
        if self.device.type != "cpu":
            idle = [max(0.0, profile.unprofiled_ms - _busy(profile)) for profile in profiles]
            texts = [f"{p.provider} {format_ms(ms, longest)} ms" for p, ms in zip(profiles, idle, strict=True)]
            lines.append(f"of which idle, the step minus its kernels: {', '.join(texts)}")
        reason = why_not_triton(self.device)
        if self.device.type == "cpu":
            lines.append("On a CPU both run the same ATen operators; differences are noise.")
        elif reason is not None:
            lines.append(f"fused runs on ATen like eager, so expect no gain: {reason}")
        return lines

    def _print(self, line: str, style: str | None = None) -> None:
        # Without markup, because a folder may be called [red]. Soft wrapping keeps paths whole for copying.
        self.console.print(clean(line), style=style, markup=False, soft_wrap=True)


def label(part: Part) -> str:
    """Return the name of the operator (CPU), or of the kernel without namespaces, arguments and template arguments.

    ATen's kernels are templates with few names, so the operator is added to them.
    """
    if not part.kernel:
        return part.operator
    name = re.sub(r"^(void |std::enable_if<.*?>::type )", "", part.kernel)
    head = re.split(r"[<(]", name.replace("(anonymous namespace)::", ""), maxsplit=1)[0]
    short = head.rsplit("::", 1)[-1].strip() or name
    return f"{short} ({part.operator.removeprefix('aten::')})" if "<" in name and part.operator else short


def _busy(profile: StepProfile) -> float:
    return sum(profile.ms_of(category) for category in CATEGORIES)
