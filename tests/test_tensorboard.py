"""TensorBoard shows every epoch of a run once, even after interruptions, and the settings."""

import importlib.util
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from resnet_fast.training import EpochMetrics
from resnet_fast.training.tensorboard import FOLDER, TAGS, TensorBoard, TensorBoardError, need_tensorboard

SETTINGS = {"model": "resnet18", "lr": 0.1, "epochs": 3, "flip": True, "data_dir": "data", "extra": [1, 2], "no": None}


def history(n_epochs: int) -> list[EpochMetrics]:
    return [EpochMetrics(i, 0.1 / i, 2.0 / i, 0.5, 2.5 / i, 0.25 * i, 1.5, 100.0 * i) for i in range(1, n_epochs + 1)]


def read(run: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(run / FOLDER))
    found.Reload()
    return found


def steps(run: Path, tag: str = "loss/test") -> list[int]:
    return [event.step for event in read(run).Scalars(tag)]


@pytest.fixture(autouse=True)
def one_process_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in the order of the seconds in their names; a process takes longer than that to start."""
    pytest.importorskip("tensorboard")
    seconds = itertools.count(2_000_000_000)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))


def test_every_epoch_has_a_point_on_every_curve(tmp_path: Path):
    board = TensorBoard(tmp_path, SETTINGS)
    for metrics in history(3):
        board.write(metrics)
    board.close()
    board.close()
    found = read(tmp_path)
    assert set(found.Tags()["scalars"]) == set(TAGS)
    for tag, field in TAGS.items():
        expected = [(m.epoch, pytest.approx(getattr(m, field))) for m in history(3)]
        assert [(event.step, event.value) for event in found.Scalars(tag)] == expected


def test_an_epoch_is_on_the_disk_before_the_run_ends(tmp_path: Path):
    board = TensorBoard(tmp_path, SETTINGS)
    board.write(history(1)[0])
    assert steps(tmp_path) == [1]
    board.close()


def test_the_settings_are_there_and_belong_to_no_run_of_their_own(tmp_path: Path):
    TensorBoard(tmp_path, SETTINGS).close()
    found = read(tmp_path)
    (text,) = found.Tensors("config/text_summary")
    assert json.loads(text.tensor_proto.string_val[0]) == SETTINGS
    assert found.summary_metadata["_hparams_/experiment"].plugin_data.plugin_name == "hparams"
    assert [path.is_file() for path in (tmp_path / FOLDER).iterdir()] == [True]


@pytest.mark.parametrize(
    ("written", "saved"),
    [
        pytest.param(2, 2, id="stopped between epochs"),
        pytest.param(2, 1, id="killed after the events, before the checkpoint"),
        pytest.param(1, 2, id="killed after the checkpoint, before the events"),
        pytest.param(3, 1, id="from the checkpoint before"),
        pytest.param(0, 2, id="never asked for before"),
    ],
)
def test_a_resumed_run_shows_each_epoch_once(written: int, saved: int, tmp_path: Path):
    if written:
        board = TensorBoard(tmp_path, SETTINGS)
        for metrics in history(written):
            board.write(replace(metrics, test_loss=99.0) if metrics.epoch > saved else metrics)
        board.close()
    board = TensorBoard(tmp_path, SETTINGS, history(saved))
    for metrics in history(4)[saved:]:
        board.write(metrics)
    board.close()
    shown = [(event.step, event.value) for event in read(tmp_path).Scalars("loss/test")]
    assert shown == [(m.epoch, pytest.approx(m.test_loss)) for m in history(4)]
    assert len(read(tmp_path).Tensors("config/text_summary")) == 1


def test_a_run_that_begins_anew_shows_nothing_of_before(tmp_path: Path):
    for loss in (99.0, 1.0):  # killed in its first epoch, after the events; started again without a checkpoint
        board = TensorBoard(tmp_path, SETTINGS)
        board.write(replace(history(1)[0], test_loss=loss))
        board.close()
    assert [event.value for event in read(tmp_path).Scalars("loss/test")] == [1.0]


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TensorBoardError, match=r"pip install tensorboard \(or the extra"):
        need_tensorboard()
    with pytest.raises(TensorBoardError):
        TensorBoard(tmp_path, SETTINGS)
    assert list(tmp_path.iterdir()) == []
