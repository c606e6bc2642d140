"""Images that cannot be read: named by `train` and `eval`, or left out by both with --skip-unreadable."""

from pathlib import Path

import pytest
from trained_run import invoke, make_image_folder, use_tiny

from resnet_fast.ops import augment


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny(monkeypatch)
    monkeypatch.setattr(augment, "choose_backend", lambda x: "aten")  # an interpreted kernel takes longer


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run on images that can all be read."""
    path = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_quick(monkeypatch)
        assert train(make_image_folder(path / "images", n_train=4), path / "run").exit_code == 0
    return path / "run"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = make_image_folder(tmp_path / "images", n_train=4)
    (data / "train" / "ape" / "0.png").write_bytes(b"no image")
    (data / "test" / "cow" / "2.png").write_bytes(b"")
    (data / "test" / "notes.txt").touch()
    return data


def train(data: Path, out: Path, *options: object):
    settings = ("--dataset", "folder", "--data-dir", data, "--image-size", 8, "--batch-size", 4, "--epochs", 1)
    return invoke("train", *settings, "--device", "cpu", "--precision", "fp32", "--workers", 0, "--out", out, *options)


REFUSED = "error: 2 of 21 images cannot be read (--skip-unreadable leaves them out): "
SKIPPED = "note: 2 of 21 images left out, unreadable: train/ape/0.png: not an image in a format that Pillow reads; "
LEFT_OUT = "note: 1 of 22 files left out, not in a class folder: test/notes.txt"


def test_without_it_nothing_is_trained(data: Path, tmp_path: Path):
    result = train(data, tmp_path / "run")
    assert result.exit_code == 1 and REFUSED in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_with_it_train_resume_and_eval_leave_them_out(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    for result in (
        train(data, run, "--skip-unreadable"),
        invoke("train", "--resume", run),
        invoke("eval", run, "--device", "cpu"),
    ):
        assert result.exit_code == 0, result.output
        assert result.stdout.count(SKIPPED) == result.stdout.count(LEFT_OUT) == 1
    assert "8 test images" in result.stdout
    result = invoke("eval", run, "--device", "cpu", "--no-skip-unreadable")
    assert result.exit_code == 1 and REFUSED in result.stderr


def test_eval_alone_may_leave_them_out(whole: Path, data: Path):
    assert invoke("eval", whole, "--device", "cpu", "--data-dir", data).exit_code == 1
    result = invoke("eval", whole, "--device", "cpu", "--data-dir", data, "--skip-unreadable")
    assert result.exit_code == 0 and SKIPPED in result.stdout


@pytest.mark.parametrize("command", ["train", "eval", "export"])
def test_a_data_dir_that_is_a_file_is_called_a_file(command: str, whole: Path, tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    result = train(file, tmp_path / "new") if command == "train" else invoke(command, whole, "--data-dir", file)
    assert result.exit_code == 1
    assert result.stderr == f"resnet-fast: error: {file} must be a folder of data, but is a file\n"
