"""A run from weights loads all of them, otherwise runs like any other, and refuses a bad file before it writes.

The network is that of tiny_run.py, its data have 3 classes.
"""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import Tiny, config_for, make_dataset, same_bits, stop, use_tiny
from trained_run import invoke

from resnet_fast import CheckpointMismatch
from resnet_fast.models.registry import MODELS
from resnet_fast.training import Reporter, Result, ResumeError, prepare, resume, train
from resnet_fast.training.checkpoint import CheckpointError
from resnet_fast.training.weights import load_weights

STILL = {"lr": 1e-30, "weight_decay": 0.0}  # weights stay, and running statistics of the same weights do almost


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny(monkeypatch.setattr)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Result:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny(monkeypatch.setattr)
        return train(config_for(tmp_path_factory.mktemp("runs") / "source", lr=0.05))


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def test_the_first_epoch_begins_where_the_other_run_ended(source: Result, tmp_path: Path):
    notes = Notes()
    tuned = train(config_for(tmp_path / "run", weights=source.out, epochs=1, **STILL), notes)
    for key, value in source.model.state_dict().items():
        if "running" not in key and "tracked" not in key:
            assert torch.equal(tuned.model.state_dict()[key], value), key
    assert tuned.history[0].test_loss == pytest.approx(source.history[-1].test_loss, abs=0.05)
    fresh = train(config_for(tmp_path / "fresh", epochs=1, **STILL))
    assert abs(fresh.history[0].test_loss - source.history[-1].test_loss) > 0.1  # the line above can tell
    assert notes.lines == [f"weights of {source.out / 'checkpoint.pt'}"]


@pytest.mark.parametrize("name", ["resnet20", "article"])
def test_every_family_gets_all_weights_and_statistics_but_a_new_last_layer(name: str, tmp_path: Path):
    stem = MODELS[name].stems[0]
    theirs, ours = MODELS[name].make(10, stem), MODELS[name].make_plain(3, stem)  # as for --backend eager
    for buffer in theirs.buffers():
        buffer.copy_(torch.rand(buffer.shape) * 5)
    torch.save({"model": theirs.state_dict()}, tmp_path / "weights.pt")
    head = dict(list(ours.state_dict().items())[-2:])
    head = {key: value.clone() for key, value in head.items()}
    assert str(load_weights(ours, tmp_path / "weights.pt", name)).endswith("new last layer: 10 classes there, 3 here")
    for key, value in ours.state_dict().items():
        assert torch.equal(value, head[key] if key in head else theirs.state_dict()[key]), key


def test_a_file_without_a_last_layer_leaves_the_network_its_own(tmp_path: Path):
    theirs, ours = Tiny(3), Tiny(3)
    weights, head = theirs.state_dict(), ours.fc.weight.clone()
    torch.save({key: value for key, value in weights.items() if "fc" not in key}, tmp_path / "weights.pt")
    assert str(load_weights(ours, tmp_path / "weights.pt", "resnet18")).endswith("no classes there, 3 here")
    assert torch.equal(ours.conv.weight, theirs.conv.weight) and torch.equal(ours.fc.weight, head)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    torch.save({**Tiny(3).state_dict(), "fc.bias": torch.full((3,), torch.nan)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="not finite: fc.bias"):
        load_weights(Tiny(3), tmp_path / "weights.pt", "resnet18")


def test_a_last_layer_of_more_values_than_the_file_has_bytes_is_refused(tmp_path: Path):
    head = {"fc.weight": torch.zeros(1, 4).expand(10**6, 4), "fc.bias": torch.zeros(1).expand(10**6)}
    torch.save({**Tiny(3).state_dict(), **head}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointMismatch):
        load_weights(Tiny(3), tmp_path / "weights.pt", "resnet18")


def test_a_run_of_another_network_is_refused_though_its_names_fit(source: Result):
    with pytest.raises(ValueError, match="run's network, plain20, got .* of resnet18"):
        load_weights(Tiny(3), source.out, "plain20")


def test_another_number_of_classes_gets_a_new_seeded_last_layer(source: Result, tmp_path: Path, monkeypatch):
    dataset = replace(make_dataset(), classes=("a", "b", "c", "d"))
    monkeypatch.setattr(prepare, "load_dataset", lambda *args, **kwargs: dataset)
    notes = Notes()
    tuned = train(config_for(tmp_path / "run", weights=source.out, epochs=1, seed=5, **STILL), notes)
    fresh = train(config_for(tmp_path / "fresh", epochs=1, seed=5, **STILL))
    assert torch.equal(tuned.model.conv.weight, source.model.conv.weight)
    assert torch.equal(tuned.model.fc.weight, fresh.model.fc.weight)
    line = f"weights of {source.out / 'checkpoint.pt'}; new last layer: 3 classes there, 4 here"
    assert notes.lines == [line]
    options = ("--dataset", "digits", "--epochs", 1, "--device", "cpu", "--out", tmp_path / "told")
    assert invoke("train", *options, "--weights", source.out).stdout.splitlines()[0] == line


def test_a_foreign_file_is_read_too(source: Result, tmp_path: Path):
    torch.save({"state_dict": torch.nn.DataParallel(source.model).state_dict()}, tmp_path / "theirs.pth")
    tuned = train(config_for(tmp_path / "run", weights=tmp_path / "theirs.pth", epochs=1, **STILL))
    assert torch.equal(tuned.model.conv.weight, source.model.conv.weight)


@pytest.mark.parametrize(
    "setting",
    [{}, {"ema": 0.9}],
    ids=lambda setting: next(iter(setting), "none"),
)
def test_a_tuned_run_is_reproducible_and_resumes_without_the_file(setting: dict, source: Result, tmp_path: Path):
    weights = tmp_path / "weights.pt"
    weights.write_bytes((source.out / "checkpoint.pt").read_bytes())
    straight = train(config_for(tmp_path / "straight", weights=weights, **setting))
    stopped = stop(tmp_path / "stopped", 2, 1, weights=weights, **setting)
    weights.unlink()
    resume(stopped)
    assert same_bits(straight.out, stopped)
    config = json.loads((stopped / "config.json").read_text())
    assert config["weights"] == str(weights)
    assert config["weights_sha256"] == hashlib.sha256((source.out / "checkpoint.pt").read_bytes()).hexdigest()


def test_a_run_without_an_epoch_needs_the_same_file_again(source: Result, tmp_path: Path, monkeypatch):
    """Also from another working directory than the one from which a relative path led to it."""
    weights = tmp_path / "weights.pt"
    weights.write_bytes((source.out / "checkpoint.pt").read_bytes())
    monkeypatch.chdir(tmp_path)
    out = stop(tmp_path / "run", 1, weights=Path("weights.pt"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    weights.rename(tmp_path / "away.pt")
    with pytest.raises(
        ResumeError, match="has finished no epoch, so it needs the weights .*weights.pt does not exist; put"
    ):
        resume(out)
    torch.save(source.model.state_dict(), weights)
    with pytest.raises(Exception, match="weights.pt does not hold the weights that the run began with"):
        resume(out)
    weights.write_bytes((source.out / "checkpoint.pt").read_bytes())
    resume(out)
    assert same_bits(train(config_for(tmp_path / "straight", weights=weights)).out, out)


def command(out: Path, *args: object):
    options = ("--dataset", "digits", "--epochs", 1, "--batch-size", 8, "--device", "cpu")
    return invoke("train", *options, "--out", out, *args)


def test_each_seed_starts_from_the_same_weights(source: Result, tmp_path: Path):
    still = [part for name, value in STILL.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = command(tmp_path / "runs", "--weights", source.out, "--repeat", 2, *still)
    assert result.exit_code == 0, result.output
    for seed in (0, 1):
        state = torch.load(tmp_path / "runs" / f"seed-{seed}" / "checkpoint.pt", weights_only=True)
        assert torch.equal(state["model"]["conv.weight"], source.model.conv.weight)


class Wider(Tiny):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.conv = torch.nn.Conv2d(3, 5, 3)


def test_a_mismatch_is_told_whole_and_nothing_is_written(tmp_path: Path):
    torch.save(Wider(3).state_dict(), tmp_path / "wider.pt")
    result = command(tmp_path / "run", "--weights", tmp_path / "wider.pt")
    assert result.exit_code == 1 and not (tmp_path / "run").exists()
    first, *rest = result.stderr.splitlines()
    assert first == f"resnet-fast: error: {tmp_path / 'wider.pt'} does not fit the model, and nothing was loaded"
    assert "    conv.weight: [5, 3, 3, 3] in the file, [4, 3, 3, 3] in the model" in rest
    with pytest.raises(CheckpointMismatch):
        train(config_for(tmp_path / "run", weights=tmp_path / "wider.pt"))


def test_a_last_layer_is_not_replaced_where_more_differs(tmp_path: Path):
    torch.save(Wider(10).state_dict(), tmp_path / "wider.pt")
    with pytest.raises(CheckpointMismatch, match="conv.weight"):
        load_weights(Tiny(3), tmp_path / "wider.pt", "resnet18")


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 2, "weights must be a run folder or a file of weights, {path} does not exist"),
        (b"PK\3\4 cut", 1, "{path} is cut short"),
    ],
    ids=["missing", "cut short"],
)
def test_a_file_that_cannot_be_used_is_named(content: bytes | None, code: int, message: str, tmp_path: Path):
    path = tmp_path / "weights.pt"
    if content is not None:
        path.write_bytes(content)
    result = command(tmp_path / "run", "--weights", path)
    assert result.exit_code == code and message.format(path=path) in result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
    with pytest.raises(ValueError if code == 2 else CheckpointError):
        train(config_for(tmp_path / "run", weights=path))


def test_a_fifo_is_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    assert "fifo is not a file" in command(tmp_path / "run", "--weights", tmp_path / "fifo").stderr


def test_after_the_end_both_ways_to_resume_say_how_to_train_on(source: Result):
    hint = f"to train further from its weights, in a new run: resnet-fast train --weights {source.out} …"
    finished = invoke("train", "--resume", source.out)
    assert finished.exit_code == 0 and hint in finished.stdout.splitlines()
    longer = invoke("train", "--resume", source.out, "--epochs", 9)
    assert longer.exit_code == 2 and longer.stderr.endswith(f"got --epochs; {hint}\n")
