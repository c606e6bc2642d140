"""`python -m benchmarks.gpu`, `make gpu`: tests and measurements for a first run on an NVIDIA GPU, in ten minutes.

The stages of gpu_stages.py run one after the other, each in its own processes with a time limit. A stage that fails or
takes too long does not stop the others. Writes results/<gpu>/: summary.csv (a row per stage), log.txt (the stages'
output) and the tables that they measure, at most eight files. `--dry-run` lists the stages.

Exit codes: 0 all passed, 1 a stage did not pass, 2 a wrong argument or no NVIDIA GPU, 130 interrupted.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.gpu_stages import STAGES, Stage
from benchmarks.results import RESULTS, ROOT, device_slug, machine_columns, no_gpu, replace_rows

BUDGET = 570  # seconds for all stages; importing, copying and the table take the rest of ten minutes
SHORTEST = 15  # seconds; no stage starts with fewer left
WIDTH = 80


def run(command: str, seconds: float, log: Path) -> tuple[str, str]:
    """Run a shell command; return "passed", "failed" or "too long", and its output, which is appended to the log."""
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}
    env.pop("TRITON_INTERPRET", None)
    start = log.stat().st_size
    with log.open("ab") as file:
        process = subprocess.Popen(
            ["sh", "-c", command],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            result = "failed" if process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            result = "too long"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and all its child processes
            process.wait()
    return result, log.read_bytes()[start:].decode(errors="replace")


def figure(stage: Stage, result: str, folder: Path, output: str) -> str:
    """Return a stage's figure or, if it did not pass, its last printed line: its tables may be from an earlier run."""
    if result == "passed":
        try:
            return stage.figure(folder, output)
        except (KeyError, ValueError) as error:
            return f"not readable: {error!r}"
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    lines = [f"{'stage':13}{'seconds':>7}  {'result':10}figure"]
    for row in rows:
        begin = f"{row['stage']:13}{row['seconds']:>7}  {row['result']:10}"
        text = f"{begin}{row['figure']}".rstrip()
        lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * len(begin), break_on_hyphens=False)
    return lines


def main(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the stages and their limits.")] = False,
    stage: Annotated[list[str] | None, typer.Option(help="Run only this stage; may be given several times.")] = None,
    results: Annotated[Path, typer.Option(help="Folder to which results are written.")] = RESULTS,
) -> None:
    """Test, train, measure and tune on an NVIDIA GPU, in ten minutes; write results/<gpu>/."""
    if unknown := set(stage or ()) - {one.name for one in STAGES}:
        raise typer.BadParameter(f"must be one of {', '.join(one.name for one in STAGES)}, got {', '.join(unknown)}")
    stages = [one for one in STAGES if not stage or one.name in stage]
    reason = no_gpu()
    if dry_run:
        print(f"{'stage':13}{'at most':>9}  proves")
        for one in stages:
            print(f"{one.name:13}{one.seconds:>7} s  {one.proves}")
        total = sum(one.seconds for one in stages)
        print(f"limits add up to {total} s; all stages together end after {BUDGET} s")
        print(f"note: {reason}" if reason else "A GPU is available: without --dry-run the stages run.")
        return
    if reason:
        typer.echo(f"error: {reason}", err=True)
        raise typer.Exit(2)
    device = torch.device("cuda", torch.cuda.current_device())
    folder = results.resolve() / device_slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    log, rows, begin, code = folder / "log.txt", [], time.monotonic(), 0
    if not stage:
        log.unlink(missing_ok=True)
    log.touch()
    workers = f"-n {min(12, os.cpu_count() or 1)}" if find_spec("xdist") else ""
    with tempfile.TemporaryDirectory() as scratch:
        names = {"python": sys.executable, "results": str(folder), "scratch": scratch}
        quoted = {name: shlex.quote(value) for name, value in names.items()} | {"workers": workers}
        for one in stages:
            left, started, result, output = BUDGET - (time.monotonic() - begin), time.monotonic(), "skipped", ""
            command = one.command.format(**quoted)
            if left >= SHORTEST and not code:
                print(f"{one.name}: at most {min(left, one.seconds):.0f} s", flush=True)
                with log.open("a", encoding="utf-8") as file:
                    file.write(f"\n{'=' * WIDTH}\n{one.name}: {command}\n")
                try:
                    result, output = run(command, min(left, one.seconds), log)
                except KeyboardInterrupt:
                    result, code = "stopped", 130
            row = {"stage": one.name, "seconds": f"{time.monotonic() - started:.1f}", "limit_s": str(one.seconds)}
            row |= {"result": result, "figure": figure(one, result, folder, output), "proves": one.proves}
            rows.append(row | machine_columns(device))
            replace_rows(folder / "summary.csv", rows[-1:], ("stage",))  # at once, in case the run is interrupted
    print("\n" + "\n".join(table(rows)))
    print(f"written to {folder}")
    if code or any(row["result"] != "passed" for row in rows):
        raise typer.Exit(code or 1)


if __name__ == "__main__":
    typer.run(main)
