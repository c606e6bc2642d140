"""CIFAR-10, CIFAR-100 and SVHN are read completely or not at all, and errors explain missing ones.

Small files stand for the real ones, and torchvision is made to expect their checksums.
"""

import hashlib
import io
import pickle
import re
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from file_server import Answer, FileServer, serving
from pages import DOCS, run_example
from torchvision.datasets import CIFAR10, CIFAR100, SVHN
from trained_run import invoke, use_tiny

from resnet_fast.common.files import only_writer
from resnet_fast.data import DataError, load_dataset, torchvision_sets
from resnet_fast.training import RECIPES, TrainConfig

PER_FILE = 4
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FINE_NAMES = [f"fine {i}" for i in range(100)]


def make_archive(path: Path, source: type[CIFAR10], meta: dict, labels: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write an archive in torchvision's format."""
    random = np.random.RandomState(0)
    sums = {}
    with tarfile.open(path, "w:gz") as tar:
        for name in [*(name for name, _ in source.train_list + source.test_list), source.meta["filename"]]:
            pixels = random.randint(0, 256, (PER_FILE, 3072), dtype=np.uint8)
            numbers = random.randint(0, len(meta[source.meta["key"]]), PER_FILE).tolist()
            content = meta if name == source.meta["filename"] else {"data": pixels, labels: numbers}
            data = pickle.dumps(content)
            sums[name] = hashlib.md5(data).hexdigest()
            info = tarfile.TarInfo(f"{source.base_folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    monkeypatch.setattr(source, "train_list", [[name, sums[name]] for name, _ in source.train_list])
    monkeypatch.setattr(source, "test_list", [[name, sums[name]] for name, _ in source.test_list])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": sums[source.meta["filename"]]})
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """All that is downloaded comes from here, with 404 for what is not among its answers."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        monkeypatch.setattr(torchvision_sets, "MIRRORS", {})
        for source in (CIFAR10, CIFAR100):
            monkeypatch.setattr(source, "url", f"{server.url}/{source.filename}")
        parts = {part: [f"{server.url}/{name}", name, md5] for part, (_, name, md5) in SVHN.split_list.items()}
        monkeypatch.setattr(SVHN, "split_list", parts)
        yield server


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: FileServer) -> Path:
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    path = tmp_path / "elsewhere" / "cifar-10-python.tar.gz"
    return make_archive(path, CIFAR10, {"label_names": NAMES}, "labels", monkeypatch)


@pytest.fixture
def archive100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: FileServer) -> Path:
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    path = tmp_path / "elsewhere" / "cifar-100-python.tar.gz"
    meta = {"fine_label_names": FINE_NAMES, "coarse_label_names": ["coarse"] * 20}
    return make_archive(path, CIFAR100, meta, "fine_labels", monkeypatch)


def serve(server: FileServer, *files: Path, folder: str = "") -> None:
    server.answers.update({f"{folder}/{file.name}": Answer(file.read_bytes()) for file in files})


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


def test_a_download_leaves_the_finished_folder_only(archive: Path, tmp_path: Path, server: FileServer):
    serve(server, archive)
    assert len(load_dataset("cifar10", tmp_path / "new" / "data").train) == 5 * PER_FILE
    assert [path.name for path in (tmp_path / "new" / "data").iterdir()] == ["cifar-10-batches-py"]


def test_it_is_downloaded_once(archive: Path, tmp_path: Path, server: FileServer):
    serve(server, archive)
    load_dataset("cifar10", tmp_path / "data")
    load_dataset("cifar10", tmp_path / "data")
    assert len(server.requests) == 1


def test_without_network_the_error_says_what_to_do(archive: Path, tmp_path: Path):
    with pytest.raises(DataError) as caught:
        load_dataset("cifar10", tmp_path / "data")
    message = str(caught.value)
    for part in ("cifar-10-python.tar.gz", str(tmp_path / "data"), "--data-dir", "--dataset digits", "404: Not Found"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "answer", [Answer(status=404), Answer(b"other bytes"), Answer(b"")], ids=["404", "lie", "empty"]
)
def test_a_failed_download_leaves_nothing(answer: Answer, archive: Path, tmp_path: Path, server: FileServer):
    server.answers[f"/{archive.name}"] = answer
    with pytest.raises(DataError):
        load_dataset("cifar10", tmp_path / "new" / "data")
    assert not (tmp_path / "new").exists()


def test_a_cut_download_leaves_a_hidden_part_which_is_completed(archive: Path, tmp_path: Path, server: FileServer):
    server.answers[f"/{archive.name}"] = Answer(archive.read_bytes(), cut_after=100)
    with pytest.raises(DataError, match="the 500 bytes received are kept for the next attempt"):
        load_dataset("cifar10", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [f".{archive.name}.part"]
    serve(server, archive)
    load_dataset("cifar10", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-py"]
    assert server.requests[-1] == (f"/{archive.name}", "bytes=500-")


def test_two_processes_download_it_once(
    archive: Path, tmp_path: Path, server: FileServer, capsys: pytest.CaptureFixture
):
    """The one that waits takes what the other brought."""
    serve(server, archive)
    (tmp_path / "data").mkdir()
    loaded = []
    with only_writer(tmp_path / "data"):
        thread = threading.Thread(target=lambda: loaded.append(load_dataset("cifar10", tmp_path / "data")))
        thread.start()
        deadline = time.monotonic() + 10
        while "waiting for another process that writes to" not in capsys.readouterr().err:
            assert thread.is_alive() and time.monotonic() < deadline
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path / "data", filter="data")
    thread.join()
    assert len(loaded) == 1 and server.requests == []


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
        patch.setattr(torchvision_sets, "extract_archive", stop)
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
    with pytest.raises(DataError, match="cifar-10-batches-py is not a complete CIFAR-10.*remove"):
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
    with pytest.raises(DataError, match=f"^{folder} is not a complete CIFAR-10.*remove"):
        load_dataset("cifar10", folder)


NO_FOLDERS = {
    "file": "file must be a folder of data, but is a file",
    "file/below": "file must be a folder of data, but is a file",
    "broken/new": "broken must be a folder of data, but is a broken link",
}


@pytest.mark.parametrize(("name", "message"), NO_FOLDERS.items(), ids=NO_FOLDERS.keys())
def test_what_is_no_folder_is_called_so_and_nothing_is_fetched(
    name: str, message: str, tmp_path: Path, server: FileServer
):
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("nowhere")
    with pytest.raises(DataError, match=f"^{tmp_path}/{message}$"):
        load_dataset("cifar10", tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file"]
    assert server.requests == []


def test_every_known_server_is_asked_before_the_data_sets_own(archive: Path, tmp_path: Path, server: FileServer):
    servers = [f"{server.url}/{name}/cifar-10-python.tar.gz" for name in "ab"]
    server.answers["/b/cifar-10-python.tar.gz"] = Answer(b"other bytes")
    torchvision_sets.MIRRORS["cifar-10-python.tar.gz"] = tuple(servers)
    serve(server, archive)
    load_dataset("cifar10", tmp_path / "data")
    assert [path.split("/")[1] for path, _ in server.requests] == ["a", "b", "cifar-10-python.tar.gz"]


@pytest.mark.parametrize("source", [CIFAR10, CIFAR100])
def test_the_own_server_is_the_last_of_several(source: type[CIFAR10]):
    urls = torchvision_sets._urls(source.url, None)
    assert urls[-1] == source.url and len(set(urls)) == len(urls) >= 3
    assert {url.partition("?")[0].rpartition("/")[2] for url in urls} == {source.filename}


@pytest.mark.parametrize("mirror", ["{}/m", "{}/m/", "{}/m/cifar-10-python.tar.gz?download=1"])
def test_a_mirror_is_asked_alone(mirror: str, archive: Path, tmp_path: Path, server: FileServer):
    with pytest.raises(DataError, match="/m/cifar-10-python.tar.gz.*: HTTP Error 404"):
        load_dataset("cifar10", tmp_path / "data", mirror=mirror.format(server.url))
    serve(server, archive, folder="/m")
    load_dataset("cifar10", tmp_path / "data", mirror=mirror.format(server.url))
    assert {path.partition("?")[0] for path, _ in server.requests} == {"/m/cifar-10-python.tar.gz"}


@pytest.mark.parametrize("mirror", [3, b"http://a", "mirror.example"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_a_mirror_that_is_no_url_is_named(name: str, mirror: object, tmp_path: Path):
    with pytest.raises(ValueError, match="^mirror must be an http:// or https:// URL"):
        load_dataset(name, tmp_path, mirror=mirror)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "file", "archive"),
    [
        ("cifar10", "?token=x", ", or of cifar-10-python.tar.gz"),
        ("cifar100", "/#data", ", or of cifar-100-python.tar.gz"),
        ("svhn", "?", ""),
        ("svhn", "/train_32x32.mat", ""),
    ],
)
def test_a_mirror_whose_files_have_no_address_is_refused(name: str, file: str, archive: str, tmp_path: Path):
    mirror = f"https://mirror.example/m{file}"
    message = f"mirror must be the URL of a folder, without ? and #{archive}, got '{mirror}'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_dataset(name, tmp_path, mirror=mirror)


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_a_mirror_of_what_is_not_downloaded_is_refused(name: str, tmp_path: Path):
    message = f"mirror is for cifar10, cifar100, svhn, got 'https://mirror.example/m' with {name}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_dataset(name, tmp_path, mirror="https://mirror.example/m")


def test_cifar100_has_the_fine_classes(archive100: Path, tmp_path: Path, server: FileServer):
    serve(server, archive100)
    dataset = load_dataset("cifar100", tmp_path / "data")
    content = pickle.loads((tmp_path / "data" / "cifar-100-python" / "test").read_bytes())
    images, labels = next(dataset.test.batches(PER_FILE))
    assert torch.equal(images, torch.from_numpy(content["data"]).reshape(-1, 3, 32, 32))
    assert labels.tolist() == content["fine_labels"] and dataset.classes == tuple(FINE_NAMES)
    assert (dataset.name, dataset.crop_padding, dataset.flip) == ("cifar100", 4, True)
    assert_normalized(dataset)


def assert_normalized(dataset) -> None:
    pixels = dataset.train.images.double() / 255
    assert np.allclose(dataset.mean, pixels.mean((0, 2, 3)), rtol=0, atol=1e-12)
    assert np.allclose(dataset.std, pixels.std((0, 2, 3), correction=0), rtol=0, atol=1e-12)


def test_the_page(archive100: Path, tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch):
    serve(server, archive100)
    monkeypatch.chdir(tmp_path)
    assert run_example(DOCS / "datasets.md")["data"].classes == tuple(FINE_NAMES)
    assert (tmp_path / "data" / "cifar-100-python").is_dir()


def test_both_cifars_lie_in_one_folder(archive: Path, archive100: Path, tmp_path: Path, server: FileServer):
    serve(server, archive, archive100)
    for name, n_classes in (("cifar10", 10), ("cifar100", 100)):
        assert len(load_dataset(name, tmp_path / "data").classes) == n_classes
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["cifar-10-batches-py", "cifar-100-python"]


@pytest.fixture
def svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: FileServer) -> dict[str, Path]:
    """Files in SVHN's format, elsewhere."""
    scipy_io = pytest.importorskip("scipy.io", reason="SVHN is read by scipy, of the extra `svhn`")
    random = np.random.RandomState(0)
    files = {part: tmp_path / "elsewhere" / SVHN.split_list[part][1] for part in ("train", "test")}
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    parts = {}
    for n_images, (part, path) in zip((12, 10), files.items(), strict=True):
        pixels = random.randint(0, 256, (32, 32, 3, n_images), dtype=np.uint8)
        labels = np.arange(n_images).reshape(-1, 1) % 10 + 1
        scipy_io.savemat(path, {"X": pixels, "y": labels.astype(np.uint8)})
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        parts[part] = [f"{server.url}/{path.name}", path.name, md5]
    monkeypatch.setattr(SVHN, "split_list", parts)
    return files


def test_svhn_has_upright_digits_from_0_to_9(svhn: dict[str, Path], tmp_path: Path, server: FileServer):
    from scipy.io import loadmat

    serve(server, *svhn.values())
    dataset = load_dataset("svhn", tmp_path / "data")
    pixels, labels = next(dataset.test.batches(10))
    content = loadmat(svhn["test"])["X"]
    for i in range(10):
        assert np.array_equal(pixels[i].permute(1, 2, 0), content[..., i])
    assert labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] and dataset.classes == tuple("0123456789")
    assert (len(dataset.train), dataset.name, dataset.crop_padding, dataset.flip) == (12, "svhn", 4, False)
    assert_normalized(dataset)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["test_32x32.mat", "train_32x32.mat"]


def test_of_svhn_only_what_lacks_is_downloaded(svhn: dict[str, Path], tmp_path: Path, server: FileServer):
    place(svhn["train"], tmp_path / "data")
    with pytest.raises(DataError, match="SVHN is not in .*/test_32x32.mat: HTTP Error 404.* Put test_32x32.mat"):
        load_dataset("svhn", tmp_path / "data")
    serve(server, *svhn.values(), folder="/m")
    load_dataset("svhn", tmp_path / "data", mirror=f"{server.url}/m")
    assert [path for path, _ in server.requests] == ["/test_32x32.mat", "/m/test_32x32.mat"]


def test_a_damaged_file_of_svhn_is_named_and_left_alone(svhn: dict[str, Path], tmp_path: Path):
    for path in svhn.values():
        place(path, tmp_path / "data")
    damaged = tmp_path / "data" / "test_32x32.mat"
    damaged.write_bytes(b"half")
    with pytest.raises(DataError, match="data/test_32x32.mat is damaged"):
        load_dataset("svhn", tmp_path / "data")
    assert damaged.read_bytes() == b"half"


def test_without_scipy_nothing_is_downloaded(tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(DataError, match=r"scipy, which is not installed: pip install scipy \(or the extra 'svhn'\)"):
        load_dataset("svhn", tmp_path / "data")
    assert server.requests == [] and list(tmp_path.iterdir()) == []


def test_is_there(archive: Path, svhn: dict[str, Path], tmp_path: Path):
    place(archive, tmp_path / "data")
    assert not torchvision_sets.is_there("cifar10", tmp_path / "data")  # only its archive
    load_dataset("cifar10", tmp_path / "data")
    place(svhn["train"], tmp_path / "data")
    assert [torchvision_sets.is_there(name, tmp_path / "data") for name in ("cifar10", "cifar100", "svhn")] == [1, 0, 0]
    place(svhn["test"], tmp_path / "data")
    assert torchvision_sets.is_there("svhn", tmp_path / "data")


def test_the_command_trains_from_a_mirror(
    archive100: Path, tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
):
    use_tiny(monkeypatch)
    options = ["--dataset", "cifar100", "--data-dir", tmp_path / "data", "--mirror", f"{server.url}/m"]
    options += ["--out", tmp_path / "run", "--epochs", 1, "--batch-size", 4, "--device", "cpu"]
    refused = invoke("train", *options)
    assert refused.exit_code == 1 and not (tmp_path / "run").exists() and not (tmp_path / "data").exists()
    assert f"({server.url}/m/{archive100.name}: HTTP Error 404: Not Found)" in refused.stderr
    assert refused.stderr.count("\n") == 1
    serve(server, archive100, folder="/m")
    trained = invoke("train", *options)
    assert trained.exit_code == 0, trained.output
    assert "100 classes" in trained.stdout and (tmp_path / "run" / "checkpoint.pt").exists()


def test_the_published_recipe_of_cifar100_is_its_default():
    """weiaicunzai/pytorch-cifar100 and DeVries and Taylor 2017, except for the schedule."""
    config = TrainConfig(dataset="cifar100", device="cpu")
    assert (config.epochs, config.batch_size, config.lr, config.weight_decay) == (200, 128, 0.1, 5e-4)
    assert (config.optimizer, config.momentum, config.flip, config.cutout) == ("sgd", 0.9, "random", 0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_mirrors_house_numbers(recipe: str):
    assert TrainConfig(dataset="svhn", recipe=recipe, device="cpu").flip == "none"
