"""A file that is not a complete file of weights gives a one-line error with name and reason; no code in it runs."""

import io
import pickle
import random
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import nn

import resnet_fast
from resnet_fast.training.checkpoint import write_checkpoint

LAYER = nn.Linear(64, 64)


def bytes_of(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zip_of(**files: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return file.getvalue()


def tar_of(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def script() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(LAYER, torch.ones(1, 64)), file)
    return file.getvalue()


def signed(tmp_path: Path) -> bytes:
    write_checkpoint(tmp_path / "signed.pt", {"model": LAYER.state_dict()}, None)
    data = bytearray((tmp_path / "signed.pt").read_bytes())
    data[len(data) // 2] ^= 1
    return bytes(data)


WHOLE, OLD = bytes_of(LAYER.state_dict()), bytes_of(LAYER.state_dict(), _use_new_zipfile_serialization=False)
SAFE = save_safetensors(LAYER.state_dict())
REFUSED = {
    "empty": (b"", "is empty"),
    "web page": (
        b"\n<!DOCTYPE html><html><body>404</body></html>",
        "is a web page, not weights: the download failed",
    ),
    "error in XML": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page, not weights"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "is a git-lfs pointer, not the weights",
    ),
    "text": (b'{"message": "Not Found"}', 'was not written by torch.save or safetensors: it begins with b\'{"message"'),
    "cut short": (WHOLE[: len(WHOLE) // 2], "is cut short: the end of the archive is missing after"),
    "cut short, old": (OLD[: len(OLD) // 2], "is damaged or cut short"),
    "cut short, safetensors": (SAFE[: len(SAFE) // 2], "is damaged, cut short or not a safetensors file"),
    "another zip": (zip_of(readme="hello"), "is a zip archive of something else: it holds readme"),
    "another pickle": (pickle.dumps({"w": 1.0}), "is damaged, or a pickle that cannot be read without running code"),
    "tar": (tar_of("storages"), "is in the tar format of PyTorch before 0.2"),
    "TorchScript": (script(), "is a TorchScript program, which is code and is not loaded; if you trust its source"),
    "whole model": (bytes_of(LAYER), "holds more than tensors and plain values (torch.nn.modules.linear.Linear)"),
    "a list": (bytes_of([torch.ones(1)]), "must hold weights by name, got a list"),
    "a tensor": (bytes_of(torch.ones(1)), "must hold weights by name, got a Tensor"),
    "no tensors": (bytes_of({"epoch": 1, "lr": 0.1}), "holds no weights; its entries are 'epoch', 'lr'"),
    "an empty dict": (bytes_of({}), "holds no weights; it is an empty dict"),
    "unknown entry": (
        bytes_of({"teacher": LAYER.state_dict()}),
        "holds no weights; there are some under entry='teacher'",
    ),
}


def refusal(path: Path, error: type[Exception] = ValueError) -> str:
    model = nn.Linear(64, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error) as caught:
        resnet_fast.load_checkpoint(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < len(str(path)) + 300, message
    assert "weights_only" not in message and "safe_globals" not in message
    assert caught.value.__suppress_context__ or "weights_only" not in repr(caught.value.__cause__)
    return message


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_file_of_weights_is_named(case: str, tmp_path: Path):
    data, reason = REFUSED[case]
    (tmp_path / "x.pth").write_bytes(data)
    assert f"x.pth {reason}" in refusal(tmp_path / "x.pth")


def test_a_changed_bit_in_a_checkpoint_of_ours_shows(tmp_path: Path):
    (tmp_path / "x.pt").write_bytes(signed(tmp_path))
    assert "is damaged: its SHA-256 is not the one" in refusal(tmp_path / "x.pt")


def test_a_file_that_is_cut_short_anywhere_is_refused(tmp_path: Path):
    for whole in (WHOLE, OLD, SAFE):
        for cut in range(1, 20):
            (tmp_path / "x.pth").write_bytes(whole[: len(whole) * cut // 20])
            refusal(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore:.*not finite")
def test_a_file_that_is_damaged_anywhere_is_refused_in_one_line_if_it_is_noticed(tmp_path: Path):
    """torch.load looks at no checksum: a changed weight is a weight."""
    generator, n_refused = random.Random(0), 0
    for whole in (WHOLE, OLD, SAFE):
        for _ in range(100):
            data = bytearray(whole)
            for _ in range(generator.choice((1, 4, 20))):
                data[generator.randrange(len(data))] = generator.randrange(256)
            (tmp_path / "x.pth").write_bytes(data)
            try:
                resnet_fast.load_checkpoint(nn.Linear(64, 64), tmp_path / "x.pth")
            except resnet_fast.CheckpointMismatch:
                n_refused += 1
            except ValueError as error:
                n_refused += 1
                assert str(error).startswith(str(tmp_path / "x.pth")) and "\n" not in str(error)
    assert n_refused > 30


def test_a_folder_names_the_files_in_it(tmp_path: Path):
    assert refusal(tmp_path).endswith("is a folder; no file of weights is in it")
    for name in ("model.safetensors", "config.json", "checkpoint.pt"):
        (tmp_path / name).touch()
    assert refusal(tmp_path).endswith("is a folder; name a file in it: checkpoint.pt, model.safetensors")


def test_no_file(tmp_path: Path):
    assert refusal(tmp_path / "absent.pth", FileNotFoundError).endswith("absent.pth does not exist")
    assert refusal(Path("~nobody-of-that-name/x.pth"), FileNotFoundError).endswith("x.pth does not exist")


def test_a_model_that_is_none(tmp_path: Path):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got OrderedDict"):
        resnet_fast.load_checkpoint(LAYER.state_dict(), tmp_path / "x.pth")  # type: ignore[arg-type]


class Harm:
    """Writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize(
    ("old", "force"), [(False, True), (True, False)], ids=("zip, all files trusted by the environment", "without zip")
)
def test_no_code_runs(old: bool, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    content = {"state_dict": LAYER.state_dict(), "extra": Harm(tmp_path / "harm")}
    path = tmp_path / "x.pth"
    path.write_bytes(bytes_of(content, _use_new_zipfile_serialization=not old))
    message = refusal(path)
    assert not (tmp_path / "harm").exists()
    assert "(exec): it is not read, because that could run code from the file; if you trust its source" in message
    assert message.endswith("torch.save(model.state_dict(), path), and load that file")
    with torch.serialization.safe_globals([exec]):  # the file does what it is said to do
        torch.load(path, weights_only=True)
    assert (tmp_path / "harm").exists()


def test_code_beside_settings_does_not_run(tmp_path: Path):
    from argparse import Namespace

    path = tmp_path / "x.pth"
    path.write_bytes(bytes_of({"state_dict": LAYER.state_dict(), "args": Namespace(x=Harm(tmp_path / "harm"))}))
    assert "(exec)" in refusal(path)
    assert not (tmp_path / "harm").exists()


def test_what_may_be_read_is_as_before_afterwards(tmp_path: Path):
    before = set(torch.serialization.get_safe_globals())
    (tmp_path / "x.pth").write_bytes(WHOLE)
    resnet_fast.load_checkpoint(nn.Linear(64, 64), tmp_path / "x.pth")
    assert set(torch.serialization.get_safe_globals()) == before


def test_safetensors_that_is_missing_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x.safetensors").write_bytes(SAFE)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    refused = refusal(tmp_path / "x.safetensors", ModuleNotFoundError)
    assert refused.endswith("pip install safetensors (or the extra 'safetensors')")
