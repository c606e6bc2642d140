"""Weights & Biases gets every epoch and the settings, without network access, and does not change the run's bits."""

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import config_for, same_bits, stop, use_tiny
from trained_run import invoke

from resnet_fast.training import Reporter, resume, train
from resnet_fast.training.tensorboard import TAGS

wandb = pytest.importorskip("wandb")

FRAGMENT_ENDS = (1, 4)  # a whole record, the last part of one


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny(monkeypatch.setattr)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # it reads the variable once


def records(file: Path) -> Iterator[Any]:
    """What W&B wrote: protocol buffers in LevelDB's log format behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        at += 32768 - at % 32768 if 32768 - at % 32768 < 7 else 0
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in FRAGMENT_ENDS:
            yield Record.FromString(parts)
            parts = b""


def files(out: Path) -> list[Path]:
    wandb.teardown()  # a process of its own writes them
    return list(out.glob("wandb/offline-run-*/*.wandb"))


def points(out: Path) -> list[tuple[int, dict[str, float]]]:
    """Of all processes that were at the run, in their order: the step, and the value on every curve."""
    found = []
    for file in sorted(files(out), key=lambda file: file.stat().st_mtime_ns):
        for record in records(file):
            if record.WhichOneof("record_type") == "history":
                values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                found.append((values["_step"], {tag: values[tag] for tag in values if tag[0] != "_"}))
    return found


class Heard(Reporter):
    def __init__(self) -> None:
        self.epochs: list[int] = []

    def end_epoch(self, metrics) -> None:
        self.epochs.append(metrics.epoch)


def test_every_epoch_has_a_point_on_every_curve_and_the_bits_stay(tmp_path: Path):
    heard = Heard()
    result = train(config_for(tmp_path / "run", wandb=True, weight_decay=0.25), heard)
    expected = [
        (metrics.epoch, {tag: pytest.approx(getattr(metrics, field)) for tag, field in TAGS.items()})
        for metrics in result.history
    ]
    assert points(result.out) == expected and heard.epochs == [1, 2, 3]
    (file,) = files(result.out)
    kinds = {record.WhichOneof("record_type"): record for record in records(file)}
    settings = {entry.key: entry.value_json for entry in kinds["run"].run.config.update}
    assert settings["weight_decay"] == "0.25" and kinds["run"].run.display_name == "run"
    assert kinds["exit"].exit.exit_code == 0
    plain = train(config_for(tmp_path / "plain", weight_decay=0.25))
    a, b = (json.loads((out / "config.json").read_text()) for out in (result.out, plain.out))
    assert {name for name in a if a[name] != b[name]} == {"out", "wandb"}


def test_a_run_goes_on_as_the_same_one(tmp_path: Path):
    out = stop(tmp_path / "run", 2, 1, wandb=True)
    (file,) = files(out)
    assert [record.exit.exit_code for record in records(file) if record.HasField("exit")] == [1]
    resume(out)
    assert [epoch for epoch, _ in points(out)] == [1, 1, 2, 3]  # W&B keeps one point of a step
    assert len(files(out)) == 2 and len({file.name for file in files(out)}) == 1  # which has the run's id
    straight = train(config_for(tmp_path / "straight", wandb=True))
    assert same_bits(straight.out, out)


def test_a_run_that_asks_later_shows_all_epochs_and_what_is_held_out_is_no_test(tmp_path: Path):
    out = stop(tmp_path / "run", 3, 1, holdout=8)
    resume(out, wandb=True)
    assert [epoch for epoch, _ in points(out)] == [1, 2, 3]
    assert {tag for _, values in points(out) for tag in values} == {tag.replace("test", "val") for tag in TAGS}


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (False, "wandb is not installed: pip install wandb (or the extra 'wandb')"),
        (True, "No API key configured. Use `wandb login` to log in. Or set WANDB_MODE=offline."),
    ],
    ids=["no package", "no login"],
)
def test_without_package_or_login_nothing_begins(installed: bool, message: str, tmp_path: Path, monkeypatch):
    if installed:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("HOME", str(tmp_path))  # whoever tests may be logged in
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
    else:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    done = invoke("train", "--dataset", "digits", "--device", "cpu", "--wandb", "--out", tmp_path / "run")
    assert done.exit_code == 1 and done.stderr.splitlines()[-1] == f"resnet-fast: error: {message}"
    assert not (tmp_path / "run").exists()


def test_a_service_that_does_not_answer_is_told_and_the_run_can_go_on_without_it(tmp_path: Path, monkeypatch):
    def fail(**kwargs: object) -> None:
        raise wandb.errors.CommError("no way")

    monkeypatch.setattr(wandb, "init", fail)
    out = tmp_path / "run"
    done = invoke("train", "--dataset", "digits", "--device", "cpu", "--wandb", "--out", out, "--epochs", 1)
    assert done.exit_code == 1 and done.stderr == "resnet-fast: error: wandb: no way\n"
    assert invoke("train", "--resume", out, "--no-wandb").exit_code == 0
