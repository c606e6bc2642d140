"""`resnet-fast train`: its output with and without a terminal, and its failures."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stand_in import stand_in
from torch import Tensor, nn
from typer.testing import CliRunner
from typer.testing import Result as CliResult

import resnet_fast
from resnet_fast.cli import app
from resnet_fast.data import load_dataset, torchvision_sets
from resnet_fast.ops import augment
from resnet_fast.training import MODELS, RECIPES, EpochMetrics, TrainConfig, console, divergence, loop, run_folder
from resnet_fast.training.console import HEADER, PlainReporter, format_duration, format_row, format_start
from resnet_fast.training.reporter import EpochProgress


class Tiny(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def pictures() -> None:
    """For a test of the pictures; in the others nothing is drawn, which would take longer than the training."""


def use_tiny(monkeypatch: pytest.MonkeyPatch, pictures: bool = False) -> None:
    monkeypatch.setitem(MODELS, "resnet18", stand_in(lambda *, num_classes, stem: Tiny(num_classes)))
    # An interpreted kernel would take most of the time; test_augment_kernel holds that both ways give the same bits.
    monkeypatch.setattr(augment, "choose_backend", lambda x: "aten")
    if not pictures:
        monkeypatch.setattr(run_folder, "draw_curves", lambda *args: None)
        monkeypatch.setattr(run_folder, "write_pictures", lambda *args: ["confusion.png"])


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    use_tiny(monkeypatch, "pictures" in request.fixturenames)


def run(*args: object) -> CliResult:
    return CliRunner().invoke(app, ["train", *map(str, args)])


def digits(out: Path, *args: object) -> CliResult:
    return run("--dataset", "digits", "--epochs", 2, "--batch-size", 256, "--device", "cpu", "--out", out, *args)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two epochs, without pictures."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny(monkeypatch)
        out = tmp_path_factory.mktemp("trained") / "run"
        assert digits(out, "--seed", 3).exit_code == 0
        return out


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_leaves_its_files_and_says_so(pictures: None, tmp_path: Path):
    result = digits(tmp_path / "run", "--seed", 7)
    assert result.exit_code == 0, result.output
    names = {"config.json", "metrics.csv", "curves.png", "checkpoint.pt", "confusion.png", "mistakes.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names | {"checkpoint-previous.pt"}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 7
    assert str(tmp_path / "run") in result.stdout and all(name in result.stdout for name in names)
    accuracy = float((tmp_path / "run" / "metrics.csv").read_text().splitlines()[-1].split(",")[5])
    assert f"{100 * accuracy:.2f} % test accuracy after epoch 2" in result.stdout
    assert "\x1b" not in result.stdout and "\r" not in result.stdout  # there is no terminal
    # Without the lines that say how an epoch goes, which a slow machine prints.
    table = [
        line for line in result.stdout.splitlines() if line == HEADER or re.match(r" +\d/2 +\S+ +\d\.\d{4} ", line)
    ]
    assert len(table) == 3 and len({len(line) for line in table[1:]}) == 1


def test_repeat_trains_with_one_seed_after_the_other(tmp_path: Path):
    result = digits(tmp_path / "runs", "--seed", 4, "--repeat", 2)
    assert result.exit_code == 0, result.output
    with open(tmp_path / "runs" / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["4", "5"]
    tables = [(tmp_path / "runs" / f"seed-{seed}" / "metrics.csv").read_text().splitlines() for seed in (4, 5)]
    assert [row["accuracy"] for row in rows] == [table[-1].split(",")[5] for table in tables]
    assert tables[0] != tables[1]
    found = [100 * float(row["accuracy"]) for row in rows]
    assert f"2 runs: {statistics.mean(found):.2f} ± {statistics.stdev(found):.2f} % after the last" in result.stdout


def test_repeat_refuses_a_folder_that_holds_something(tmp_path: Path):
    (tmp_path / "seed-0").mkdir()
    result = digits(tmp_path, "--repeat", 2)
    assert result.exit_code == 2 and "already holds seed-0" in result.stderr


def test_what_is_held_out_is_not_called_a_test(tmp_path: Path):
    result = digits(tmp_path / "run", "--holdout", 100)
    assert "1,337 + 100 (held out) images" in result.stdout and "val loss" in result.stdout
    assert "validation accuracy after epoch 2" in result.stdout and " test " not in result.stdout
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert "val_accuracy" in header and "test" not in header


def test_a_time_budget_says_how_to_go_on(tmp_path: Path):
    result = digits(tmp_path / "run", "--time-budget", 1e-6)
    assert result.exit_code == 0
    assert "the time budget ended the run before epoch 2 of 2" in result.stdout
    assert f"to resume: resnet-fast train --resume {tmp_path / 'run'}" in result.stdout
    assert run("--resume", tmp_path / "run").exit_code == 0
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lr", "-1"], "lr must be a positive finite number, got -1.0"),
        (["--device", "gpu"], "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--epochs", "many"], "'--epochs'"),
        (["--nonsense"], "--nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_exit_with_2_and_write_nothing(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    result = run("--dataset", "digits", *args)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_exits_with_2_and_is_left_alone(tmp_path: Path):
    (tmp_path / "config.json").write_text("of another run")
    result = digits(tmp_path)
    assert result.exit_code == 2
    assert "already holds config.json" in result.stderr and result.stderr.count("\n") == 1
    assert (tmp_path / "config.json").read_text() == "of another run"


def test_missing_cifar10_exits_with_1_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(torchvision_sets, "download", refuse)
    result = run("--data-dir", tmp_path / "data", "--out", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 1
    assert "--dataset digits needs no network" in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_program_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args) -> None:
        raise RuntimeError("a bug, not deterministic")

    monkeypatch.setattr("resnet_fast.cli.run.run_training", fail)
    assert isinstance(digits(tmp_path / "run").exception, RuntimeError)
    refused = digits(tmp_path / "run", "--deterministic")
    assert refused.exit_code == 1 and "--deterministic refuses an operation: a bug" in refused.stderr


def test_a_closed_pipe_ends_a_run_without_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(config: TrainConfig, reporter: object) -> None:
        config.out.mkdir()
        (config.out / "config.json").touch()
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")  # as `print` does after `| head`

    monkeypatch.setattr("resnet_fast.cli.run.run_training", fail)
    result = digits(tmp_path / "run")
    assert (result.exit_code, result.stderr) == (1, "")


def test_too_little_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("resnet_fast.cli.run.run_training", fail)
    result = digits(tmp_path / "run")
    assert result.exit_code == 1 and "try a smaller --batch-size, or --accumulate" in result.stderr


def test_a_loss_that_is_not_finite_exits_with_1(tmp_path: Path):
    result = digits(tmp_path / "run", "--lr", 1e30, "--precision", "fp32")
    assert result.exit_code == 1
    assert re.search(r"loss became (nan|inf) .*epoch 1.*; no epoch was finished", result.stderr)
    assert re.search(r"suspects: the learning rate, \S+e\+29 there \(try a smaller --lr\)", result.stderr)
    assert "--resume would come to the same end" in result.stderr
    assert "Traceback" not in result.output


def test_muons_learning_rate_is_a_suspect_too():
    suspects = divergence.suspects(nn.Linear(1, 1), 0.1, "fp32", muon_lr=0.12)
    assert suspects == "suspects: the learning rate, 0.1 there (try a smaller --lr); --muon-lr, at most 0.12"


def interrupt_in_epoch_2(monkeypatch: pytest.MonkeyPatch, number: int | None = None) -> None:
    train_epoch = loop.train_epoch

    def interrupted(*args):
        if args[1] == 2:
            if number is None:
                raise KeyboardInterrupt
            signal.raise_signal(number)
        return train_epoch(*args)

    monkeypatch.setattr(loop, "train_epoch", interrupted)


def environment(**changes: str) -> dict[str, str]:
    root = str(Path(resnet_fast.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "COLUMNS": "80", "LINES": "24", "TRITON_INTERPRET": "0", **changes}


TINY_RUN = """
import sys
from dataclasses import replace
from torch import nn
from resnet_fast.training import MODELS
class Tiny(nn.Sequential):
    def __init__(self, *, num_classes, stem):
        super().__init__(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))
MODELS["resnet18"] = replace(MODELS["resnet18"], build=Tiny)
from resnet_fast.training import run_folder
run_folder.draw_curves, run_folder.write_pictures = lambda *args: None, lambda *args: []
from resnet_fast.cli import app
app()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals and signals are POSIX")
def test_on_a_terminal_a_bar_and_rows_fit_80_columns_until_ctrl_c(tmp_path: Path):
    import fcntl
    import pty
    import struct
    import termios

    main, worker = pty.openpty()
    fcntl.ioctl(worker, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    args = ["train", "--dataset", "digits", "--epochs", "99", "--device", "cpu", "--out", "run"]
    # As the installed command, not by `python -m`, under which CPython (3.11) ends by SIGINT itself, whatever the exit
    # code, where the interrupt met a string in exec, as in the dataclasses of a module that torch imports late.
    process = subprocess.Popen(
        [sys.executable, "-c", TINY_RUN, *args],
        env=environment(TERM="xterm-256color", OMP_NUM_THREADS="1"),
        cwd=tmp_path,
        stdout=worker,
        stderr=worker,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(worker)
    output, is_interrupted = b"", False
    try:
        while chunk := os.read(main, 4096):
            output += chunk
            if not is_interrupted and b"epoch 4/99 " in output:
                process.send_signal(signal.SIGINT)
                is_interrupted = True
    except OSError:  # how Linux says that the other end was closed
        pass
    finally:
        os.close(main)
    text = output.decode()
    assert process.wait(timeout=60) == 130, text
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    shown = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", text)]
    assert max(len(line) for line in shown if "resnet-fast: " not in line) <= 80
    # The bar shows loss, accuracy, speed and the time left.
    bar = r"epoch [123]/99 .*\d/60 loss \d+\.\d{3}  \d+\.\d %  [\d,]+ images/s  .* left"
    assert any(re.search(bar, line) for line in shown)
    rows = [match[1] for line in shown if (match := re.match(r" +(\d+)/99 +\S+ +\d\.\d{4}", line))]
    kept = re.search(r"resnet-fast: interrupted; run keeps the checkpoint, metrics and curves up to epoch (\d+)", text)
    assert kept and HEADER in shown and rows == [str(i + 1) for i in range(int(kept[1]))]
    assert "Traceback" not in text and not list((tmp_path / "run").glob(".*"))
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] == int(kept[1])


EVERY = dict(  # every augmentation, every stage frozen
    flip="alternating", cutout=12, trivial_augment=True, random_erasing=0.125, mixup=0.125, cutmix=0.125,
    weights="w.pt", freeze="stem,layer1,layer2,layer3,layer4",
)  # fmt: skip


def test_the_opening_names_what_differs_from_the_recipe():
    dataset = load_dataset("digits")
    for recipe in RECIPES:
        plain = format_start(TrainConfig(dataset="digits", device="cpu", recipe=recipe), dataset)
        assert not any("unlike" in line for line in plain), recipe
    changes = dict(optimizer="muon", muon_lr=0.5, sizes="8,12", lookahead=True, nesterov=False, label_smoothing=0.125)
    lines = format_start(TrainConfig(dataset="digits", device="cpu", **changes), dataset)
    start = next(i for i, line in enumerate(lines) if "unlike" in line)
    named = " ".join(line.strip() for line in lines[start : start + 2]).removeprefix("unlike the recipe: ").split(", ")
    assert set(named) == {
        "optimizer muon", "muon-lr 0.5", "sizes 8,12", "lookahead", "no-nesterov", "label-smoothing 0.125",
    }  # fmt: skip


def test_the_opening_names_augmentations_and_frozen_stages():
    dataset = load_dataset("digits")
    config = TrainConfig(dataset="digits", device="cpu", crop=None, padding="reflect", **EVERY)
    assert format_start(config, dataset)[2:-1] == [
        f"augmentation: crop {dataset.crop_padding} (reflect), flip alternating, cutout 12, trivial-augment,",
        "  random-erasing 0.125, mixup 0.125, cutmix 0.125",
        "frozen: stem, layer1, layer2, layer3, layer4",
    ]
    plain = format_start(TrainConfig(dataset="digits", device="cpu", recipe="article"), dataset)
    assert plain[2:-1] == ["augmentation: none"]


def test_the_opening_notes_settings_that_do_not_pay(monkeypatch: pytest.MonkeyPatch):
    def notes(**settings: object) -> list[str]:
        lines = format_start(TrainConfig(dataset="digits", device="cpu", **settings), load_dataset("digits"))
        return [line for line in lines if line.startswith("note: ")]

    alone = "note: --sync-bn has no effect with a single process"
    slow = "note: --precision fp16 is several times slower than fp32 on a CPU"
    assert notes(sync_bn=True, precision="fp16") == [alone, slow]
    assert notes(precision="fp32") == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert notes(sync_bn=True) == []


def test_the_widest_lines_fit_80_columns():
    metrics = EpochMetrics(200, 1.2e-05, 12.3456, 1.0, 123.4567, 1.0, 1234.5, 99999)
    assert len(HEADER) == len(format_row(metrics, 200)) <= 80
    config = TrainConfig(model="resnet152", stem="imagenet", schedule="triangular", lr=0.0125, device="cpu", **EVERY)
    sized = type("Sized", (), {"__len__": lambda self: 1_281_167})()
    dataset = type(
        "Dataset", (), {"classes": ["x"] * 1000, "train": sized, "test": sized, "notes": (), "crop_padding": 28}
    )()
    held_out = TrainConfig(model="resnet152", backend="compile", dataset="cifar100", holdout=5000, device="cpu")
    for opening in (config, held_out):
        assert max(map(len, format_start(opening, dataset))) <= 80


def test_durations_are_readable():
    found = {3.21: "3.2 s", 52.4: "52 s", 59.7: "1 min 00 s", 200: "3 min 20 s", 7500: "2 h 05 min"}
    assert {seconds: format_duration(seconds) for seconds in found} == found


def test_without_a_terminal_a_long_epoch_says_how_it_goes(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock.now))
    reporter = PlainReporter()
    reporter.start(TrainConfig(dataset="digits", epochs=2, device="cpu", out=tmp_path), load_dataset("digits"))
    reporter.start_epoch(1, 100)
    for done in range(1, 101):
        clock.now += 1
        reporter.step(done, EpochProgress(loss=2.0, accuracy=0.25, images_per_second=30))
    assert [line for line in capsys.readouterr().out.splitlines() if " steps " in line] == [
        "    1/2  8/100 steps  loss 2.000  25.0 %  30 images/s  3 min 12 s left",
        "    1/2  24/100 steps  loss 2.000  25.0 %  30 images/s  2 min 56 s left",
        "    1/2  56/100 steps  loss 2.000  25.0 %  30 images/s  2 min 24 s left",
    ]


def test_resume_goes_on_and_shows_the_whole_table(tmp_path: Path):
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_in_epoch_2(monkeypatch)
        first = digits(tmp_path / "run")
    assert f"to resume: resnet-fast train --resume {tmp_path / 'run'}\n" in first.stderr
    result = run("--resume", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 0, result.output
    # The last of the epoch's lines is its row; a slow machine prints progress above it.
    assert [line for line in first.stdout.splitlines() if line.startswith("    1/2")][-1] in result.stdout
    assert re.search(r"\n    1/2 .*\nresumed after epoch 1\n    2/2 .*\n", result.stdout)
    assert f"mistakes.png\nin {tmp_path / 'run'}" in result.stdout
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3


def test_resume_of_a_finished_run_says_so(finished: Path):
    result = run("--resume", finished)
    assert result.exit_code == 0
    assert "nothing to resume: the run is finished" in result.stdout
    assert "test accuracy after epoch 2" in result.stdout


def test_resume_before_the_end_of_epoch_1_begins_anew_with_the_same_settings(finished: Path):
    config = (finished / "config.json").read_bytes()
    weights = torch.load(finished / "checkpoint.pt", weights_only=True)["model"]
    for path in finished.iterdir():
        if path.name != "config.json":
            path.unlink()
    result = run("--resume", finished)
    assert "resumed from the beginning, because no epoch was finished" in result.stdout
    again = torch.load(finished / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, weights[name]) for name, value in again.items())
    assert (finished / "config.json").read_bytes() == config


BESIDE = "--graph, --data-dir, --mirror, --images, --device, --workers, --time-budget, --tensorboard, --wandb"


def test_resume_takes_no_setting_beside_it_not_even_the_same(finished: Path):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    for args, name in ((["--epochs", "2"], "--epochs"), (["--no-nesterov"], "--nesterov"), (["--out", "x"], "--out")):
        result = run("--resume", finished, *args)
        assert result.exit_code == 2
        assert f"only {BESIDE} may be given as well, got {name}" in result.stderr
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_resume_may_be_told_where_data_and_processor_are(finished: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("resnet_fast.cli.run.resume_training", lambda run, reporter: seen.append(run.config) or stop())

    def stop() -> None:
        raise KeyboardInterrupt

    run("--resume", finished, "--data-dir", finished / "d", "--workers", 2, "--device", "cpu")
    assert (seen[0].data_dir, seen[0].workers, seen[0].epochs) == (finished / "d", 2, 2)


def test_resume_of_no_run_exits_with_2(tmp_path: Path):
    result = run("--resume", tmp_path / "absent")
    assert result.exit_code == 2
    assert f"{tmp_path / 'absent'} is neither" in result.stderr and result.stderr.count("\n") == 1


def test_a_bad_checkpoint_exits_with_1_and_the_command_it_offers_works(finished: Path):
    os.truncate(finished / "checkpoint.pt", 1000)
    result = run("--resume", finished)
    assert result.exit_code == 1
    assert "checkpoint.pt is cut short" in result.stderr and result.stderr.count("\n") == 1
    offered = re.search(r"--resume (\S+) resumes after epoch 1", result.stderr)
    assert offered and run("--resume", offered[1]).exit_code == 0


def test_sigterm_exits_with_143_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = signal.getsignal(signal.SIGTERM)
    interrupt_in_epoch_2(monkeypatch, signal.SIGTERM)
    result = digits(tmp_path / "run")
    assert result.exit_code == 143
    assert f"terminated; {tmp_path / 'run'} keeps the checkpoint, metrics and curves up to epoch 1" in result.stderr
    assert f"to resume: resnet-fast train --resume {tmp_path / 'run'}" in result.stderr
    assert "Traceback" not in result.output and signal.getsignal(signal.SIGTERM) == before
    assert not list((tmp_path / "run").glob(".*"))
