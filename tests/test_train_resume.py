"""A run stopped at any moment resumes to the bits of an uninterrupted run; unusable files are refused."""

import os
import random
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import EPOCHS, Stop, Tiny, config_for, make_dataset, same_bits, stop, use_tiny, without_times

from resnet_fast.common import files
from resnet_fast.training import (
    Result,
    ResumeError,
    checkpoint,
    loop,
    prepare,
    resume,
    train,
)
from resnet_fast.training.random_state import random_states, restore_random_states


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors are quicker with one, and on a shared machine much."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny(monkeypatch.setattr)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, one_thread: None) -> Result:
    """A run that was never stopped."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny(monkeypatch.setattr)
        return train(config_for(tmp_path_factory.mktemp("straight") / "run"))


@pytest.mark.parametrize(("epoch", "step"), [(1, 0), (1, 4), (2, 5), (3, 0)])
def test_a_resumed_run_ends_with_the_bits_of_one_never_stopped(epoch: int, step: int, straight: Result, tmp_path: Path):
    result = resume(stop(tmp_path / "run", epoch, step))
    assert same_bits(result.out, straight.out)
    assert without_times(result.history) == without_times(straight.history)
    weights = straight.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in result.model.state_dict().items())
    assert not result.model.training


OTHER_SETTINGS = [
    {"flip": "alternating"},
    {"crop": 1, "padding": "reflect", "cutout": 3, "schedule": "triangular"},
    {"recipe": "article"},
    {"optimizer": "adam", "ema": 0.9, "bn_bias_lr": 4.0},
    {"bn_bias_lr": 64.0, "clip_norm": 0.1, "label_smoothing": 0.2, "nesterov": False},
    {"ghost_batch_size": 0, "batch_size": 9, "accumulate": 2},
    {"normalize": "half", "holdout": 7, "precision": "bf16"},
    {"precision": "fp16", "ema": 0.9},
    {"trivial_augment": True, "random_erasing": 0.5, "cutout": 2, "mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1},
    {"lookahead": True, "bn_momentum": 0.4, "schedule": "linear"},
]


@pytest.mark.parametrize("setting", OTHER_SETTINGS, ids=str)
def test_other_settings_are_resumed_as_they_are(setting: dict, tmp_path: Path):
    straight = train(config_for(tmp_path / "straight", **setting))
    result = resume(stop(tmp_path / "run", 2, 3, **setting))
    assert same_bits(result.out, straight.out)


def test_the_files_of_a_resumed_run_show_all_epochs(straight: Result, tmp_path: Path):
    resume(stop(tmp_path / "run", 3, 2))
    rows, expected = (
        [line.split(",")[:6] for line in (out / "metrics.csv").read_text().splitlines()]
        for out in (tmp_path / "run", straight.out)
    )
    assert rows == expected and len(rows) == 1 + EPOCHS
    names = ["checkpoint-previous.pt", "checkpoint.pt", "config.json", "curves.png", "metrics.csv"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    drawn = [(out / "curves.png").read_bytes() for out in (tmp_path / "run", straight.out)]
    assert drawn[0] == drawn[1]


def test_the_checkpoint_before_is_kept(straight: Result):
    epochs = [
        torch.load(straight.out / name, weights_only=True)["epoch"]
        for name in ("checkpoint-previous.pt", "checkpoint.pt")
    ]
    assert epochs == [EPOCHS - 1, EPOCHS]


def test_a_finished_run_trains_nothing_and_mends_its_table(straight: Result, tmp_path: Path):
    result = train(config_for(tmp_path / "run"))
    table = (result.out / "metrics.csv").read_text()
    # Killed between the last checkpoint and its table.
    (result.out / "metrics.csv").write_text("".join(table.splitlines(keepends=True)[:-1]))
    again = resume(result.out, Stop(EPOCHS + 1))
    assert again.history == result.history and (result.out / "metrics.csv").read_text() == table


def test_the_seconds_of_all_parts_are_added(tmp_path: Path):
    out = stop(tmp_path / "run", 3)
    state = checkpoint.read_checkpoint(out / "checkpoint.pt")
    assert state["seconds"] > sum(metrics["seconds"] for metrics in state["history"])
    state["seconds"] = 1000.0
    checkpoint.write_checkpoint(out / "checkpoint.pt", state, None)
    assert 1000 < resume(out).seconds < 1100


def test_a_run_can_be_moved(straight: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stop(tmp_path / "run", 2).rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert same_bits(resume("moved").out, straight.out)


def test_the_global_random_states_come_back():
    cpu = torch.device("cpu")
    np.random.randn()  # leaves a second normal number behind
    random.gauss(0, 1)
    saved = random_states(cpu)

    def draw() -> tuple:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))

    drawn = draw()
    assert draw() != drawn
    restore_random_states(saved, cpu)
    assert draw() == drawn


# What is refused.


def damage(name: str) -> Callable[[Path], None]:
    """Return what makes a good checkpoint bad."""

    def other_format(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(checkpoint, "FORMAT", 1)
            del state["format"]
            checkpoint.write_checkpoint(path, state, None)

    def other_settings(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        state["config"]["lr"] = 0.5
        checkpoint.write_checkpoint(path, state, None)

    def flipped(path: Path) -> None:
        data = bytearray(path.read_bytes())
        weight = torch.load(path, weights_only=True)["model"]["fc.weight"]
        data[data.index(weight.numpy().tobytes()) + 2] ^= 1
        path.write_bytes(data)
        torch.load(path, weights_only=True)  # notices nothing

    return {
        "missing": Path.unlink,
        "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
        "flipped bit": flipped,
        "a state dict": lambda path: torch.save(Tiny(3).state_dict(), path),
        "another format": other_format,
        "other settings": other_settings,
    }[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "is missing"),
        ("truncated", "is cut short: its end is missing after"),
        ("flipped bit", "is damaged: its SHA-256 is not the one"),
        ("a state dict", "has no checksum of `resnet-fast train`: another program or an older version wrote it"),
        ("another format", r"has format 1, resnet_fast \S+ reads format 2"),
        ("other settings", "belongs to another run: lr is 0.5 there and 0.0125 in config.json"),
    ],
)
def test_a_bad_checkpoint_is_refused_with_its_reason_and_the_one_before_is_offered(
    name: str, reason: str, straight: Result, tmp_path: Path
):
    out = stop(tmp_path / "run", 3)
    damage(name)(out / "checkpoint.pt")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ResumeError, match=f"checkpoint.pt ({reason}).*; .*previous.pt is whole") as caught:
        resume(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    offered = re.search(r"--resume (\S+) resumes after epoch 1$", str(caught.value))
    assert offered and same_bits(resume(offered[1]).out, straight.out)


def test_a_changed_bit_anywhere_in_a_checkpoint_shows(tmp_path: Path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write_checkpoint(path, {"model": torch.arange(8.0), "epoch": 1}, None)
    data = path.read_bytes()
    for i in [*range(0, len(data), 7), *range(len(data) - 120, len(data))]:
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.read_checkpoint(path)
    path.write_bytes(data)
    assert checkpoint.read_checkpoint(path)["epoch"] == 1


def test_nothing_in_a_foreign_file_is_run(tmp_path: Path):
    class Harm:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "harm",)

    out = stop(tmp_path / "run", 2)
    checkpoint.write_checkpoint(out / "checkpoint.pt", {"config": Harm()}, None)  # with a checksum that is right
    with pytest.raises(ResumeError, match="checkpoint.pt must hold plain values"):
        resume(out)
    assert not (tmp_path / "harm").exists()


def test_no_whole_checkpoint_left_is_said(tmp_path: Path):
    out = stop(tmp_path / "run", 3)
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        os.truncate(out / name, 100)
    with pytest.raises(ResumeError, match=r"checkpoint.pt is cut short.*previous.pt is cut short.*no whole checkpoint"):
        resume(out)


def test_a_bad_checkpoint_never_takes_the_place_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = stop(tmp_path / "run", 3)
    os.truncate(out / "checkpoint.pt", 100)
    resumed = []
    monkeypatch.setattr(loop, "load_run", lambda *args, load=loop.load_run: resumed.append(load(*args)) or resumed[-1])
    with pytest.raises(KeyboardInterrupt):
        resume(out / "checkpoint-previous.pt", Stop(3))
    assert resumed[0].checkpoint["epoch"] == 1
    epochs = [checkpoint.read_checkpoint(out / f"checkpoint{name}.pt")["epoch"] for name in ("-previous", "")]
    assert epochs == [1, 2]


def test_what_a_run_computes_cannot_be_changed(tmp_path: Path):
    out = stop(tmp_path / "run", 2)
    with pytest.raises(
        ValueError, match="a resumed run keeps its settings except graph, .*, tensorboard, wandb, got lr"
    ):
        resume(out, lr=1)


def test_other_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = stop(tmp_path / "run", 2)
    monkeypatch.setattr(prepare, "load_dataset", lambda *args, **kwargs: make_dataset(n_train=40))
    with pytest.raises(ResumeError, match="train_images is 40, .*config.json says 41"):
        resume(out)


@pytest.mark.parametrize(("text", "reason"), [("{", "is not JSON"), ("{}", "holds no .*: an earlier version")])
def test_a_damaged_config_is_refused(text: str, reason: str, tmp_path: Path):
    out = stop(tmp_path / "run", 2)
    (out / "config.json").write_text(text)
    with pytest.raises(ResumeError, match=f"config.json {reason}"):
        resume(out)


@pytest.mark.parametrize("path", ["absent", "empty"])
def test_a_folder_without_a_run_is_no_argument(path: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=f"resume must be a run folder or a checkpoint in one, {tmp_path / path} is neither"
    ):
        resume(tmp_path / path)


# Disks and signals.


@pytest.mark.skipif(sys.platform == "win32", reason="the lock is POSIX's")
def test_two_processes_are_never_at_one_run(straight: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = stop(tmp_path / "run", 2)
    monkeypatch.setattr("resnet_fast.training.run_folder.PATIENCE", 0)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with files.only_writer(out), pytest.raises(BlockingIOError, match=f"another process writes to {out}"):
        resume(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert same_bits(resume(out).out, straight.out)


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_a_disk_that_fails_keeps_whole_checkpoints_to_go_on_from(
    call: str, straight: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = stop(tmp_path / "run", 3)

    def fail(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, call, fail)
        if call == "link":  # nor can the file be copied then
            full.setattr(checkpoint.shutil, "copyfileobj", fail)
        with pytest.raises(OSError, match="No space"):
            checkpoint.write_checkpoint(out / "checkpoint.pt", {"epoch": 3}, out / "checkpoint-previous.pt")
    epochs = [checkpoint.read_checkpoint(out / f"checkpoint{name}.pt")["epoch"] for name in ("-previous", "")]
    assert epochs == [1, 2]
    assert not list(out.glob(".*"))
    assert not same_bits(out, straight.out)
    assert same_bits(resume(out).out, straight.out)


@pytest.mark.skipif(sys.platform == "win32", reason="limits are POSIX")
def test_a_checkpoint_for_which_there_is_no_room_keeps_the_one_before(straight: Result, tmp_path: Path):
    import resource

    out = stop(tmp_path / "run", 2)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["checkpoint.pt"]) // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            resume(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert same_bits(resume(out).out, straight.out)


def test_a_file_system_without_links_keeps_the_checkpoint_before(
    straight: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    out = train(config_for(tmp_path / "run")).out
    assert same_bits(out, straight.out)
    assert checkpoint.read_checkpoint(out / "checkpoint-previous.pt")["epoch"] == EPOCHS - 1


FILE_CALLS = ("open", "fsync", "link", "replace", "unlink", "mkdir")


def check_whole(out: Path) -> None:
    """What has its name is whole, at whatever moment the process was killed."""
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        if (out / name).exists():
            checkpoint.read_checkpoint(out / name)
    if (out / "checkpoint-previous.pt").exists():
        assert (out / "checkpoint.pt").exists()
    if (out / "metrics.csv").exists():
        assert (out / "metrics.csv").read_bytes().endswith(b"\n")


def test_a_run_killed_before_any_call_ends_with_the_bits_of_one_never_killed(tmp_path: Path):
    """A process that is killed leaves what is on the disk then: a copy of it before each call that changes it."""
    out, copies = tmp_path / "run", []

    def copied(call: Callable) -> Callable:
        def copy_first(*args, **kwargs):
            with one_at_a_time:  # the thread that writes, and the one that trains
                with monkeypatch.context() as as_before:
                    for name, original in originals.items():
                        as_before.setattr(os, name, original)
                    copies.append(tmp_path / str(len(copies)))
                    if out.exists():
                        shutil.copytree(out, copies[-1])
                return call(*args, **kwargs)

        return copy_first

    originals, one_at_a_time = {name: getattr(os, name) for name in FILE_CALLS}, threading.RLock()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, original in originals.items():
            monkeypatch.setattr(os, name, copied(original))
        # As many epochs as there are kinds: one without a checkpoint before it, and one with it.
        straight = train(config_for(out, epochs=2))
    assert len(copies) >= 6
    names = {path.name for path in out.iterdir()}
    for copy in copies:
        check_whole(copy)
        if (copy / "config.json").exists():
            resume(copy)
        else:
            shutil.rmtree(copy, ignore_errors=True)  # a folder in which nothing began is not used again
            train(config_for(copy, epochs=2))
        check_whole(copy)
        assert same_bits(copy, straight.out)
        assert {path.name for path in copy.iterdir()} == names  # nothing is left half done
        assert (copy / "curves.png").read_bytes() == (out / "curves.png").read_bytes()
