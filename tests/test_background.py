"""An epoch's files are written during the training of the next epoch, and nothing is lost."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from test_cli_train import environment
from tiny_run import EPOCHS, Stop, config_for, equal, use_tiny

from resnet_fast.training import EpochMetrics, EpochProgress, Reporter, checkpoint, run_folder, train
from resnet_fast.training.background import Background

pytestmark = pytest.mark.usefixtures("one_thread")
PATIENCE = 30  # seconds for what should happen at once


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny(monkeypatch.setattr)


class Told(Reporter):
    """Notes what it is told, and lets the checkpoint of epoch 1 be written in the middle of epoch 2."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.middle, self.epoch = threading.Event(), 0

    def start_epoch(self, epoch: int, n_steps: int) -> None:
        self.epoch = epoch

    def step(self, done: int, progress: EpochProgress | None) -> None:
        if (self.epoch, done) == (2, 3):
            self.events.append("step 3 of epoch 2")
            self.middle.set()

    def end_epoch(self, metrics: EpochMetrics) -> None:
        self.events.append(f"row {metrics.epoch}")


@pytest.mark.usefixtures("tiny")
def test_an_epoch_trains_while_the_one_before_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    straight = train(config_for(tmp_path / "straight", epochs=2)).out
    reporter, write = Told(), checkpoint.write_checkpoint

    def write_later(path: Path, state: dict, previous: Path | None) -> None:
        assert reporter.middle.wait(PATIENCE)
        write(path, state, previous)
        reporter.events.append(f"checkpoint {state['epoch']}")

    monkeypatch.setattr(run_folder, "write_checkpoint", write_later)
    out = train(config_for(tmp_path / "run", epochs=2), reporter).out
    assert reporter.events == ["step 3 of epoch 2", "checkpoint 1", "row 1", "checkpoint 2", "row 2"]
    for name in ("checkpoint-previous.pt", "checkpoint.pt"):  # the weights of their epoch, not of the steps since
        states = [torch.load(folder / name, weights_only=True) for folder in (out, straight)]
        assert all(equal(*(state[part] for state in states)) for part in ("epoch", "model", "step", "random"))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("full_at", [1, EPOCHS])
def test_a_full_disk_ends_the_run_at_the_next_checkpoint_or_at_the_end(
    full_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reporter, save, fsync, saved = Told(), torch.save, os.fsync, []

    def note_epoch(state: dict, file: io.BytesIO) -> None:
        saved.append(state["epoch"])
        save(state, file)

    def fail_in_time(number: int) -> None:
        if saved[-1:] == [full_at]:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(checkpoint.torch, "save", note_epoch)
    monkeypatch.setattr(os, "fsync", fail_in_time)
    with pytest.raises(OSError, match="No space left on device: .*/run/checkpoint.pt"):
        train(config_for(tmp_path / "run"), reporter)
    assert reporter.epoch == min(full_at + 1, EPOCHS)  # trained to its end
    assert reporter.events[-1:] == ([f"row {EPOCHS - 1}"] if full_at == EPOCHS else ["step 3 of epoch 2"])
    if full_at == EPOCHS:
        assert checkpoint.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["epoch"] == EPOCHS - 1
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_loses_no_epoch_that_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = checkpoint.write_checkpoint
    monkeypatch.setattr(run_folder, "write_checkpoint", lambda *args: (time.sleep(0.2), write(*args)))
    with pytest.raises(KeyboardInterrupt):
        train(config_for(tmp_path / "run"), Stop(3))
    assert checkpoint.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["epoch"] == 2
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path: Path):
    worker = Path(__file__).with_name("killed_worker.py")
    command = [sys.executable, str(worker), str(tmp_path), "12"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3  # by chance nine


# The thread itself.


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_calls_run_one_after_the_other_and_what_follows_them_in_this_thread():
    events = []
    with Background() as background:
        for i in range(3):
            background.start(
                lambda i=i: (time.sleep(0.01), events.append(i)),
                then=lambda i=i: events.append((i, threading.current_thread() is threading.main_thread())),
            )
    assert events == [0, (0, True), 1, (1, True), 2, (2, True)]


def fail() -> None:
    raise OSError(28, "No space left on device", "run/checkpoint.pt")


def nothing_follows() -> None:
    raise AssertionError("it failed")


def test_an_error_is_raised_where_it_is_waited_for_and_never_in_between():
    with Background() as background:
        background.start(fail, then=nothing_follows)
        assert background.thread is not None
        background.thread.join()
        background.poll()
        with pytest.raises(OSError, match="run/checkpoint.pt"):
            background.start(fail, then=nothing_follows)
        background.start(fail, then=nothing_follows)
        with pytest.raises(OSError, match="run/checkpoint.pt"):
            background.finish()
        background.finish()  # it is told once


def test_an_error_at_the_end_of_the_block_is_raised():
    with pytest.raises(OSError, match="run/checkpoint.pt"), Background() as background:
        background.start(fail, then=nothing_follows)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_one_call_is_waited_for_lets_the_next_begin():
    """What is waited for may take as long as an epoch, and the epoch that is done must not be lost."""
    done = []
    with pytest.raises(KeyboardInterrupt), Background() as background:
        background.start(lambda: (time.sleep(0.2), done.append(1)), then=lambda: None)
        threading.Timer(0.05, partial(os.kill, os.getpid(), signal.SIGINT)).start()
        background.start(lambda: (time.sleep(0.05), done.append(2)), then=lambda: done.append("told"))
        done.append("not reached")
    assert done == [1, 2, "told"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_sigterm_ends_a_script_after_the_call():
    code = """
import os, signal, time
from resnet_fast.training.background import Background
with Background() as background:
    background.start(lambda: (time.sleep(0.3), print("written", flush=True)), then=lambda: None)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not reached")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "written\n"), done.stderr


def test_sigterm_has_the_effect_of_before_after_the_block():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with Background():
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
