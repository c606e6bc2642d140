"""`make gpu` runs every stage within its time, even if others fail, and reports the results."""

import csv
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import gpu
from benchmarks.gpu_stages import STAGES, Stage, last
from benchmarks.results import ROOT
from resnet_fast.cli import app as cli

app = typer.Typer()
app.command()(gpu.main)


def stage(name: str, command: str, seconds: int = 60) -> Stage:
    return Stage(name, command, seconds, "what it proves", last(r"figure: (.*)"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs made-up stages on a GPU that is not there; returns what was said, and the summary's rows by stage."""
    monkeypatch.setattr(gpu, "no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "device_slug", lambda device: "made-up")
    monkeypatch.setattr(gpu, "machine_columns", lambda device: {"device": "made up"})

    def run(*stages: Stage, options: tuple[str, ...] = ()):
        monkeypatch.setattr(gpu, "STAGES", list(stages))
        done = CliRunner().invoke(app, ["--results", str(tmp_path), *options])
        summary = tmp_path / "made-up" / "summary.csv"
        rows = csv.DictReader(summary.read_text().splitlines()) if summary.exists() else ()
        return done, {row["stage"]: row for row in rows}

    return run


def test_a_stage_that_fails_does_not_stop_the_others(run, tmp_path):
    done, rows = run(stage("one", "echo figure: 1"), stage("two", "echo no; exit 3"), stage("three", "echo figure: 3"))
    assert done.exit_code == 1
    assert {name: (row["result"], row["figure"]) for name, row in rows.items()} == {
        "one": ("passed", "1"),
        "two": ("failed", "no"),
        "three": ("passed", "3"),
    }
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80 and "three" in done.stdout
    log = (tmp_path / "made-up" / "log.txt").read_text()
    assert log.count("figure: ") == 2 * 2 and "two: echo no; exit 3" in log  # each with its command


def test_all_passed_and_a_stages_row_is_there_when_it_has_ended(run):
    first = stage("one", "{python} -c 'print(f\"figure: {{6 * 7}}\")'")
    done, rows = run(first, stage("two", "grep --quiet one,.*,42, {results}/summary.csv"))
    assert done.exit_code == 0 and rows["one"]["figure"] == "42"


def test_a_stage_that_takes_too_long_is_killed_with_all_that_it_has_started(run, tmp_path):
    late = tmp_path / "late"
    begin = time.monotonic()
    done, rows = run(stage("one", f"(sleep 4; touch {late}) & sleep 60", 1), stage("two", "echo figure: 2"))
    assert done.exit_code == 1 and rows["one"]["result"] == "too long" and rows["two"]["figure"] == "2"
    time.sleep(max(0.0, begin + 5 - time.monotonic()))
    assert not late.exists()


def test_no_stage_begins_when_the_time_is_over(run, monkeypatch):
    monkeypatch.setattr(gpu, "BUDGET", gpu.SHORTEST + 0.5)
    done, rows = run(stage("one", "sleep 1"), stage("two", "echo figure: 2"))
    assert done.exit_code == 1
    assert [rows[name]["result"] for name in ("one", "two")] == ["passed", "skipped"]


def test_a_stage_gets_what_is_left(run, monkeypatch):
    monkeypatch.setattr(gpu, "BUDGET", 2)
    monkeypatch.setattr(gpu, "SHORTEST", 1)
    begin = time.monotonic()
    _, rows = run(stage("one", "sleep 60"))
    assert rows["one"]["result"] == "too long" and time.monotonic() - begin < 30


def test_one_stage_alone_keeps_the_others_rows_and_log(run, tmp_path):
    stages = [stage("one", "echo figure: 1"), stage("two", "exit 1")]
    run(*stages)
    done, rows = run(stages[0], stage("two", "echo figure: 2"), options=("--stage", "two"))
    assert done.exit_code == 0
    assert {name: row["result"] for name, row in rows.items()} == {"one": "passed", "two": "passed"}
    assert "figure: 1" in (tmp_path / "made-up" / "log.txt").read_text()


def test_an_old_table_is_not_the_figure_of_a_stage_that_failed(run, tmp_path):
    (tmp_path / "made-up").mkdir()
    (tmp_path / "made-up" / "profile.csv").write_text("provider,category,kernel,ms_per_step\nfused,idle,,1\n")
    profile = next(one for one in STAGES if one.name == "profile")
    assert profile.figure(tmp_path / "made-up", "") == "fused: combine 0.0%, idle 100.0%"
    _, rows = run(profile._replace(command="echo broken; exit 1"))
    assert rows["profile"]["figure"] == "broken"
    (tmp_path / "made-up" / "profile.csv").write_text("provider,kernel\nfused,x\n")
    _, rows = run(profile._replace(command="true"))
    assert rows["profile"]["figure"] == "not readable: KeyError('ms_per_step')"


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = CliRunner().invoke(app)
    assert done.exit_code == 2 and done.stderr.startswith("error: no NVIDIA GPU") and done.stderr.count("\n") == 1


def test_a_dry_run_lists_stages_and_limits():
    done = CliRunner().invoke(app, ["--dry-run"])
    assert done.exit_code == 0
    for one in STAGES:
        assert f"{one.seconds} s  {one.proves}" in done.stdout
    assert f"limits add up to {sum(one.seconds for one in STAGES)} s" in done.stdout


def test_an_unknown_stage_is_refused():
    done = CliRunner().invoke(app, ["--stage", "shop"])
    assert done.exit_code == 2 and "got shop" in done.stderr


def pieces(one: Stage) -> list[list[str]]:
    """The commands of a stage, as words."""
    names = {"python": sys.executable, "results": "results/gpu", "scratch": "scratch", "workers": ""}
    words = shlex.split(one.command.format(**names).replace(";", " ; "))
    found: list[list[str]] = [[]]
    for word in words:
        if word in (";", "&&"):
            found.append([])
        else:
            found[-1].append(word)
    return found


def test_the_commands_take_their_options():
    commands = typer.main.get_command(cli)
    seen = set()
    for words in (words for one in STAGES for words in pieces(one) if "resnet_fast.cli" in words):
        name, *arguments = words[words.index("resnet_fast.cli") + 1 :]
        commands.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
        seen.add(name)
    assert seen == {"doctor", "train", "profile", "tune"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [one.name for one in STAGES if "-m pytest" in one.command])
def test_the_tests_of_a_stage_are_found(name):
    (words,) = pieces(next(one for one in STAGES if one.name == name))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*words, "--collect-only"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "::" in done.stdout, done.stdout + done.stderr
