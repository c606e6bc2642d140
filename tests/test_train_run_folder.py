"""Files of a run are complete or absent, never overwritten, and have the documented content."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch
from PIL import Image

from resnet_fast.common.files import whole_file
from resnet_fast.data import Augmentation, ImageDataset, TensorSplit
from resnet_fast.training import EpochMetrics, TrainConfig, curves, loop, run_folder, train
from resnet_fast.training.paths import check_is_free
from resnet_fast.training.run_folder import RunFolder

# Not the data set's mean and std, nor its crop: what is used, not what the data set says.
AUGMENTATION = Augmentation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), crop=2)


def make_dataset() -> ImageDataset:
    split = TensorSplit(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    return ImageDataset("digits", ("a", "b"), split, split, (0.5,) * 3, (0.7,) * 3, 1, False)


def make_history(n_epochs: int, test_accuracy: float = 0.75) -> list[EpochMetrics]:
    return [
        EpochMetrics(i, 0.1 / i, 2 / i, 0.5, 2.5 / i, test_accuracy, 1.23456789, 100.0) for i in range(1, n_epochs + 1)
    ]


def make_state() -> dict:
    return {"model": {"w": torch.arange(3.0)}, "step": {"n_done": 4}, "random": [{}]}


def start_folder(config: TrainConfig) -> RunFolder:
    folder = RunFolder(config, make_dataset(), AUGMENTATION)
    with folder.hold(is_new=True):
        folder.start()
    return folder


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "draw_curves", lambda file, *rest: None)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(dataset="digits", epochs=6, device="cpu", precision="bf16", out=tmp_path / "runs" / "one")


def test_a_file_appears_when_it_is_finished(tmp_path: Path):
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"]
)
def test_a_file_that_fails_leaves_what_was_there(error: BaseException, tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(type(error)), whole_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda number: order.append("fsync"))
    real_replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *args: (order.append("replace"), real_replace(*args)))
    with whole_file(tmp_path / "file") as file:
        file.write(b"x")
    assert order == ["fsync", "replace"]


def test_a_new_and_an_empty_folder_are_free(tmp_path: Path):
    check_is_free(tmp_path / "new")
    check_is_free(tmp_path)


@pytest.mark.parametrize("name", ["config.json", ".hidden"])
def test_a_folder_with_any_file_is_not_free(name: str, tmp_path: Path):
    (tmp_path / name).write_text("")
    with pytest.raises(FileExistsError, match=f"already holds {name}"):
        check_is_free(tmp_path)


def test_a_file_is_no_run_folder(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match="run is a file"):
        check_is_free(tmp_path / "run")


def test_a_folder_cannot_be_made_in_a_file(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="out must be a folder, .*/file is a file"):
        check_is_free(tmp_path / "file/runs/1")


def test_config_json_is_there_before_the_first_epoch_and_complete(config: TrainConfig):
    start_folder(config)
    assert [path.name for path in config.out.iterdir()] == ["config.json"]
    values = json.loads((config.out / "config.json").read_text())
    assert values["mean"] == [0.1, 0.2, 0.3] and values["std"] == [0.4, 0.5, 0.6]
    assert (values["device"], values["precision"], values["flip"]) == ("cpu", "bf16", "none")
    assert values["crop"] == 2 and config.crop is None
    assert (values["train_images"], values["test_images"], values["classes"]) == (4, 4, ["a", "b"])
    assert (values["epochs"], values["batch_size"], values["lr"]) == (config.epochs, config.batch_size, config.lr)
    assert values["versions"]["torch"] == torch.__version__ and "resnet_fast" in values["versions"]
    assert [name for name, value in values.items() if value == "auto"] == ["images"]  # as the memory allows
    assert [name for name, value in values.items() if value is None] == ["mirror", "weights"]


def test_an_epoch_leaves_four_files(config: TrainConfig, no_pictures: None):
    folder = start_folder(config)
    folder.write_epoch(make_history(1), make_state())
    names = ["checkpoint.pt", "config.json", "curves.png", "metrics.csv"]
    assert sorted(path.name for path in config.out.iterdir()) == names


def test_metrics_csv_has_a_row_per_epoch(config: TrainConfig, no_pictures: None):
    folder = start_folder(config)
    for n_epochs in (1, 2, 3):
        folder.write_epoch(make_history(n_epochs), make_state())
    with open(config.out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = "epoch lr train_loss train_accuracy test_loss test_accuracy seconds images_per_second skipped_steps"
    assert list(rows[0]) == columns.split()
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["lr"]) == pytest.approx(0.1 / 3, rel=1e-5)
    assert rows[0]["seconds"] == "1.23457"


def test_the_checkpoint_loads_safely_and_holds_plain_values(config: TrainConfig, no_pictures: None):
    start_folder(config).write_epoch(make_history(2), make_state())
    checkpoint = torch.load(config.out / "checkpoint.pt", weights_only=True)
    of_state, of_run = {"model", "step", "random"}, {"epoch", "history", "config", "classes"}
    assert set(checkpoint) == {"format", "mean", "std", "image_size"} | of_state | of_run
    assert (checkpoint["mean"], checkpoint["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert checkpoint["image_size"] == 8
    assert checkpoint["epoch"] == 2 and checkpoint["classes"] == ["a", "b"]
    assert checkpoint["config"] == {**config.as_dict(), "crop": 2}  # what is used, not "as the data set says"
    assert torch.equal(checkpoint["model"]["w"], torch.arange(3.0))


def test_a_full_disk_keeps_the_checkpoint_before(
    config: TrainConfig, no_pictures: None, monkeypatch: pytest.MonkeyPatch
):
    folder = start_folder(config)
    folder.write_epoch(make_history(1), make_state())

    def fail(value, file) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        folder.write_epoch(make_history(2), make_state())
    assert torch.load(config.out / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert len(list(config.out.iterdir())) == 4


def test_the_curves_are_drawn_now_and_then_and_at_the_end(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    """A picture takes as long as an epoch on a large GPU."""
    now, drawn = 0.0, []
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now)
    monkeypatch.setattr(run_folder, "draw_curves", lambda file, history, *rest: drawn.append(len(history)))
    folder = start_folder(config)
    assert config.epochs == 6
    for n_epochs, now in enumerate((100.0, 129.9, 130.0, 150.0, 159.9, 160.0), start=1):  # noqa: B007
        folder.write_epoch(make_history(n_epochs), make_state())
    assert drawn == [1, 3, 6]
    folder = start_folder(replace(config, out=config.out.with_name("two")))
    for n_epochs, now in enumerate((200.0, 201.0, 202.0, 203.0, 204.0, 205.0), start=1):  # noqa: B007
        folder.write_epoch(make_history(n_epochs), make_state())
    assert drawn == [1, 3, 6, 1, 6]


def test_the_curves_are_a_picture_even_of_one_epoch_without_an_error(config: TrainConfig):
    history = make_history(1, test_accuracy=1.0)
    start_folder(config).write_epoch(history, make_state())
    with Image.open(config.out / "curves.png") as image:
        image.load()
        assert image.format == "PNG" and image.width >= 1200
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    drawn = {
        tuple(bytes.fromhex(style["color"][1:])) for style in (curves.TRAIN, curves.TEST, curves.RATE, curves.SPEED)
    }
    assert len(drawn) == 4 and drawn <= colors


def test_the_curves_have_four_panels_that_show_every_epoch(monkeypatch: pytest.MonkeyPatch):
    figures = []
    monkeypatch.setattr(curves.Figure, "savefig", lambda figure, file, format: figures.append(figure))
    curves.draw_curves(io.BytesIO(), make_history(3), "network on data", 5, 100, "test", True)
    panels = {axes.get_title("left"): axes for axes in figures[0].axes}
    assert list(panels) == [
        "cross-entropy loss",
        "error (%)",
        "learning rate, at the end of the epoch",
        "training images/s",
    ]
    values = {name: [list(line.get_ydata()) for line in axes.lines] for name, axes in panels.items()}
    assert values["cross-entropy loss"] == [[2, 1, 2 / 3], [2.5, 1.25, 2.5 / 3]]
    assert values["error (%)"] == [[50] * 3, [25] * 3]
    assert values["learning rate, at the end of the epoch"] == [[0.1, 0.05, 0.1 / 3]]
    assert values["training images/s"] == [[100] * 3]
    assert all(axes.get_xlim() == (0.5, 5.5) for axes in panels.values())


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({}, "training"),
        ({"flip": "random"}, "training, augmented images"),
    ],
    ids=["nothing", "flip"],
)
def test_the_curves_say_whether_images_are_augmented(change: dict, label: str, config: TrainConfig, monkeypatch):
    figures = []
    monkeypatch.setattr(curves.Figure, "savefig", lambda figure, file, format: figures.append(figure))
    folder = RunFolder(config, make_dataset(), replace(AUGMENTATION, **{"crop": 0, **change}))
    config.out.mkdir(parents=True)
    folder.write_epoch(make_history(1), make_state())
    for axes in figures[0].axes[:2]:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [label, "test"]


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_wait_until_a_file_is_whole(tmp_path: Path, interruptible: None):
    with pytest.raises(KeyboardInterrupt):
        with whole_file(tmp_path / "file") as file:
            file.write(b"first ")
            signal.raise_signal(signal.SIGINT)
            file.write(b"second")
    assert (tmp_path / "file").read_bytes() == b"first second"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_leaves_nothing_unfinished(tmp_path: Path):
    code = """
import os, signal, sys
from pathlib import Path
from resnet_fast.common.files import whole_file
with whole_file(Path(sys.argv[1])) as file:
    os.kill(os.getpid(), signal.SIGTERM)
    file.write(b"whole")
print("not reached")
"""
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGTERM and done.stdout == "", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    first = TrainConfig(dataset="digits").out
    first.mkdir(parents=True)
    assert (str(first), str(TrainConfig(dataset="digits").out)) == (
        "runs/digits-resnet18-now",
        "runs/digits-resnet18-now-2",
    )


def test_of_two_runs_that_find_a_folder_empty_one_gets_it(config: TrainConfig):
    first, second = (RunFolder(config, make_dataset(), AUGMENTATION) for _ in range(2))
    check_is_free(config.out)  # for both
    with first.hold(is_new=True):
        # Before config.json is there, and after.
        with pytest.raises(FileExistsError, match="out must be a folder of its own, another process writes to"):
            with second.hold(is_new=True):
                pass
        first.start()
    with second.hold(is_new=True), pytest.raises(FileExistsError, match="already holds config.json"):
        second.start()


def test_a_run_that_was_faster_is_not_trained_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_run.use_tiny(monkeypatch.setattr)
    out, before = tmp_path / "run", []

    def check_and_lose(folder: Path) -> None:
        check_is_free(folder)
        monkeypatch.setattr(loop, "check_is_free", check_is_free)
        train(tiny_run.config_for(out, seed=1))
        before.extend(path.read_bytes() for path in sorted(out.iterdir()))

    monkeypatch.setattr(loop, "check_is_free", check_and_lose)
    with pytest.raises(FileExistsError, match="out must be a new or empty folder, .* already holds"):
        train(tiny_run.config_for(out, seed=2))
    assert len(before) == 5 and [path.read_bytes() for path in sorted(out.iterdir())] == before
