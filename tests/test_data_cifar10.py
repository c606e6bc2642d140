"""CIFAR-10 is taken whole or not at all, and a missing one is explained. (A small archive stands for the real one.)"""

import hashlib
import io
import pickle
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet_fast.data import DataError, cifar10, load_dataset

PER_FILE = 4
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive in torchvision's format, whose checksums torchvision is made to expect; no network."""
    random = np.random.RandomState(0)
    path = tmp_path / "elsewhere" / "cifar-10-python.tar.gz"
    path.parent.mkdir()
    sums = {}
    with tarfile.open(path, "w:gz") as tar:
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
            pixels = random.randint(0, 256, (PER_FILE, 3072), dtype=np.uint8)
            labels = random.randint(0, 10, PER_FILE).tolist()
            content = {"label_names": NAMES} if name == "batches.meta" else {"data": pixels, "labels": labels}
            data = pickle.dumps(content)
            sums[name] = hashlib.md5(data).hexdigest()
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    dataset = cifar10.CIFAR10
    monkeypatch.setattr(dataset, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(dataset, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    forbid_network(monkeypatch)
    return path


def forbid_network(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
    def refuse(*args, **kwargs):
        raise error or urllib.error.URLError("no network in tests")

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", refuse)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes, error: BaseException | None = None) -> None:
    """Let a download write `content` and then raise `error`."""

    def write(url: str, path: str, *args) -> None:
        Path(path).write_bytes(content)
        if error:
            raise error

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **kwargs: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", write)


def place(archive: Path, data_dir: Path) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    (data_dir / archive.name).write_bytes(archive.read_bytes())


def test_the_archive_in_the_folder_is_unpacked(archive: Path, tmp_path: Path):
    place(archive, tmp_path / "data")
    dataset = load_dataset("cifar10", tmp_path / "data")
    assert (len(dataset.train), len(dataset.test)) == (5 * PER_FILE, PER_FILE)
    assert dataset.classes == tuple(NAMES)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["cifar-10-batches-py", archive.name]


def test_pixels_and_labels_are_those_of_the_files(archive: Path, tmp_path: Path):
    place(archive, tmp_path / "data")
    dataset = load_dataset("cifar10", tmp_path / "data")
    content = pickle.loads((tmp_path / "data" / "cifar-10-batches-py" / "test_batch").read_bytes())
    images, labels = next(dataset.test.batches(PER_FILE))
    assert torch.equal(images, torch.from_numpy(content["data"]).reshape(-1, 3, 32, 32))
    assert labels.tolist() == content["labels"]


def test_the_constants_and_augmentation_of_cifar10(archive: Path, tmp_path: Path):
    place(archive, tmp_path / "data")
    dataset = load_dataset("cifar10", tmp_path / "data")
    assert dataset.mean == (0.4914, 0.4822, 0.4465)
    assert dataset.std == (0.2470, 0.2435, 0.2616)
    assert dataset.crop_padding == 4 and dataset.flip is True


def test_a_download_leaves_the_finished_folder_only(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    serve(monkeypatch, archive.read_bytes())
    assert len(load_dataset("cifar10", tmp_path / "new" / "data").train) == 5 * PER_FILE
    assert [path.name for path in (tmp_path / "new" / "data").iterdir()] == ["cifar-10-batches-py"]


def test_it_is_downloaded_once(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    serve(monkeypatch, archive.read_bytes())
    load_dataset("cifar10", tmp_path / "data")
    forbid_network(monkeypatch, AssertionError("asked for the network again"))
    load_dataset("cifar10", tmp_path / "data")


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("[Errno -3] Temporary failure in name resolution"),
        OSError("connection reset"),
        RuntimeError("File not found or corrupted."),
    ],
    ids=["URLError", "OSError", "RuntimeError"],
)
def test_without_network_the_error_says_what_to_do(
    error: Exception, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    forbid_network(monkeypatch, error)
    with pytest.raises(DataError) as caught:
        load_dataset("cifar10", tmp_path / "data")
    message = str(caught.value)
    for part in ("cifar-10-python.tar.gz", str(tmp_path / "data"), "--data-dir", "--dataset digits", "no network"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("part", "error"),
    [
        pytest.param(slice(0), urllib.error.URLError("unreachable"), id="nothing came"),
        pytest.param(slice(100), OSError("connection reset"), id="cut"),
        pytest.param(slice(100), None, id="short, wrong md5"),
        pytest.param(slice(100), KeyboardInterrupt(), id="Ctrl-C"),
    ],
)
def test_a_failed_download_leaves_nothing(
    part: slice, error: BaseException | None, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    serve(monkeypatch, archive.read_bytes()[part], error)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DataError):
        load_dataset("cifar10", tmp_path / "new" / "data")
    assert not (tmp_path / "new").exists()


def test_a_failed_download_leaves_what_was_there(archive: Path, tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("kept")
    with pytest.raises(DataError):
        load_dataset("cifar10", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine.txt"]


def test_unpacking_that_stops_is_not_mistaken_for_the_data(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place(archive, tmp_path / "data")

    def stop(source: str, target: str) -> None:
        (Path(target) / "cifar-10-batches-py").mkdir()
        (Path(target) / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cifar10, "extract_archive", stop)
        with pytest.raises(DataError, match="could not be unpacked.*No space left"):
            load_dataset("cifar10", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [archive.name]
    load_dataset("cifar10", tmp_path / "data")


def test_a_damaged_archive_is_named_and_left_alone(archive: Path, tmp_path: Path):
    place(archive, tmp_path / "data")
    damaged = tmp_path / "data" / archive.name
    damaged.write_bytes(b"half")
    with pytest.raises(DataError, match="cifar-10-python.tar.gz is damaged"):
        load_dataset("cifar10", tmp_path / "data")
    assert damaged.read_bytes() == b"half"


@pytest.mark.parametrize("change", ["altered", "missing"])
def test_a_damaged_folder_is_named_and_left_alone(change: str, archive: Path, tmp_path: Path):
    place(archive, tmp_path / "data")
    load_dataset("cifar10", tmp_path / "data")
    file = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(b"altered") if change == "altered" else file.unlink()
    with pytest.raises(DataError, match="cifar-10-batches-py is not a whole CIFAR-10.*remove"):
        load_dataset("cifar10", tmp_path / "data")
    assert (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_1").exists()


@pytest.mark.parametrize("name", ["cifar-10-batches-py", "renamed"])
def test_the_folder_of_the_batches_may_be_named_itself(name: str, archive: Path, tmp_path: Path):
    place(archive, tmp_path / "data")
    expected = load_dataset("cifar10", tmp_path / "data")
    folder = (tmp_path / "data" / "cifar-10-batches-py").rename(tmp_path / "data" / name)
    assert torch.equal(load_dataset("cifar10", folder).train.images, expected.train.images)  # type: ignore[attr-defined]
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []  # nothing was put into it


def test_an_absent_folder_of_the_batches_is_not_put_into_itself(archive: Path, tmp_path: Path):
    place(archive, tmp_path / "data")
    load_dataset("cifar10", tmp_path / "data" / "cifar-10-batches-py")
    assert (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_1").is_file()


def test_a_damaged_folder_that_is_named_itself_is_explained(archive: Path, tmp_path: Path):
    place(archive, tmp_path / "data")
    load_dataset("cifar10", tmp_path / "data")
    folder = tmp_path / "data" / "cifar-10-batches-py"
    (folder / "batches.meta").unlink()
    with pytest.raises(DataError, match=f"^{folder} is not a whole CIFAR-10.*remove"):
        load_dataset("cifar10", folder)


NO_FOLDERS = {"file": "file is a file", "file/below": "file is a file", "broken/new": "broken is a link to nothing"}


@pytest.mark.parametrize(("name", "message"), NO_FOLDERS.items(), ids=NO_FOLDERS.keys())
def test_what_is_no_folder_is_called_so_and_nothing_is_fetched(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    forbid_network(monkeypatch, AssertionError("asked for the network"))
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("nowhere")
    with pytest.raises(DataError, match=f"^{tmp_path}/{message}, and a folder of data is needed there$"):
        load_dataset("cifar10", tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file"]
