"""A file that would take far more memory than its bytes, or never end, is refused by both readers before it is read."""

import codecs
import io
import os
import socket
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import _utils as torch_utils
from torch import nn

import resnet_fast
from resnet_fast.checkpoints import archive
from resnet_fast.checkpoints.signature import sign
from resnet_fast.training.checkpoint import CheckpointError, read_checkpoint


def saved(content: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


class Call:
    """Pickled as the call of a function that torch.load permits."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def rezipped(compression: int = zipfile.ZIP_STORED, again: str = "") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as source, zipfile.ZipFile(file, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        if again:
            with pytest.warns(UserWarning, match="Duplicate name"):
                target.writestr(again, b"x")
    return file.getvalue()


def entries_changed(value: int, *fields: int) -> bytes:
    """Change fields of 4 bytes in each entry of the table of contents."""
    data, at = bytearray(WHOLE), 0
    while (at := data.find(b"PK\1\2", at)) >= 0:
        for field in fields:
            data[at + field : at + field + 4] = struct.pack("<I", value)
        at += 4
    return bytes(data)


def doubled(times: int) -> Call:
    value: object = "a"
    for _ in range(times):
        value = Call(codecs.encode, value, "hex")
    return Call(codecs.encode, value, "hex")


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def within_itself() -> dict:
    content: dict = {"epoch": 1}
    content["model"] = content
    return content


WHOLE = saved({"weight": torch.ones(2, 2)})
WIDE = torch.zeros(1).expand(2**34)  # 4 bytes that stand for 64 GB
REFUSED = {
    "compressed": (lambda: rezipped(zipfile.ZIP_DEFLATED), r"holds compressed data \('archive/data.pkl'\)"),
    "compressed, other method": (lambda: rezipped(zipfile.ZIP_LZMA), "holds compressed data"),
    "unlike sizes": (lambda: entries_changed(2**31 - 1, 24), "holds compressed data"),
    "sizes beyond the file": (lambda: entries_changed(2**31 - 1, 20, 24), "members"),
    "members in one place": (lambda: entries_changed(0, 42), "members do not follow each other"),
    "bytes before the archive": (lambda: b"PK\3\4" + bytes(60) + WHOLE, "members do not follow each other"),
    "one name twice": (lambda: rezipped(again="archive/data.pkl"), "two of its members have the same name"),
    "bytes of zeros": (lambda: saved({"x": Call(bytearray, 2**34)}), "asks for bytearray, which can turn a few bytes"),
    "bytes of zeros, old format": (
        lambda: saved({"x": Call(bytearray, 2**34)}, _use_new_zipfile_serialization=False),
        "asks for bytearray",
    ),
    "bytes doubled": (lambda: saved({"x": doubled(40)}), "encodes values as hex, which can turn a few bytes"),
    "a wide tensor copied": (
        lambda: saved(
            {"x": Call(torch_utils._rebuild_device_tensor_from_cpu_tensor, WIDE, torch.float64, "cpu", False)}
        ),
        "asks for _rebuild_device_tensor_from_cpu_tensor",
    ),
    "many values": (lambda: saved([1] * 2_001), "holds more than 2,000 values"),
    "nested": (lambda: saved(nested(200)), "nested more than 100 deep"),
    "within itself": (lambda: saved(within_itself()), "nested more than 100 deep, or within themselves"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_both_readers_refuse_it(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make, reason = REFUSED[case]
    data, path = make(), tmp_path / "x.pt"
    monkeypatch.setattr(archive, "MAX_STEPS", 2000)
    path.write_bytes(data)
    # What takes gigabytes must not be reached; a nested value takes none, and is seen after it was read.
    if "nest" not in reason:
        monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("was read"))
    with pytest.raises(ValueError, match=rf"^{path} .*{reason}") as caught:
        resnet_fast.load_checkpoint(nn.Linear(2, 2), path)
    assert "\n" not in str(caught.value)
    if data.startswith(b"PK"):
        signed = io.BytesIO(data)
        sign(signed)
        path.write_bytes(signed.getvalue())
        with pytest.raises(CheckpointError, match=rf"^{path} .*{reason}"):
            read_checkpoint(path)


def test_what_torch_writes_is_read(tmp_path: Path):
    """Bytes, a parameter with an attribute, a dict in two places, and an attribute that hides a method."""
    parameter = nn.Parameter(torch.full((2, 2), 2.0))
    parameter.to = "mine"  # type: ignore[assignment]
    state = OrderedDict(weight=parameter, bias=torch.ones(2))
    state.get = 5  # type: ignore[method-assign, assignment]
    model = nn.Linear(2, 2)
    torch.save({"model": state, "also": state, "bytes": b"\x80\xff"}, tmp_path / "x.pt")
    assert resnet_fast.load_checkpoint(model, tmp_path / "x.pt").entry == "model"
    assert torch.equal(model.weight, parameter.data)


def test_a_wide_tensor_of_few_bytes_is_never_copied(tmp_path: Path):
    torch.save({"weight": WIDE, "bias": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(resnet_fast.CheckpointMismatch, match=r"weight: \[17179869184\] in the file, \[2, 2\]"):
        resnet_fast.load_checkpoint(nn.Linear(2, 2), tmp_path / "x.pt")


def test_a_dict_in_many_places_is_looked_through_once(tmp_path: Path):
    content: dict = {"epoch": 1}
    for _ in range(60):
        content = dict.fromkeys(("state_dict", "model", "net", "model_ema"), content)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        resnet_fast.load_checkpoint(nn.Linear(2, 2), tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_is_no_regular_file_is_not_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "x.pt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # the name of a socket has at most 107 characters
        socket.socket(socket.AF_UNIX).bind("x.pt")
    for read, error in (
        (lambda: resnet_fast.load_checkpoint(nn.Linear(2, 2), path), ValueError),
        (lambda: read_checkpoint(path), CheckpointError),
    ):
        with pytest.raises(error, match=rf"^{path} is not a regular file$"):
            read()
