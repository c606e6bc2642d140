"""Files are written under an unpredictable name, and an error names the file that should have been written."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_fast.common.files import delete_unfinished, unfinished_name, whole_file

resource = pytest.importorskip("resource", reason="permissions and limits of files are POSIX")


def test_the_unfinished_name_cannot_be_foreseen(tmp_path: Path):
    names = set()
    for _ in range(2):
        with whole_file(tmp_path / "file"):
            names |= {path.name for path in tmp_path.iterdir()} - {"file"}
    assert len(names) == 2 and all(re.fullmatch(r"\.file\.[0-9a-f]{16}\.tmp", name) for name in names)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_has_the_unfinished_name_already_is_left_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target, trap = tmp_path / "target", tmp_path / ".file.trap.tmp"
    target.write_text("somebody's")
    trap.symlink_to(target) if kind == "link" else trap.write_text("somebody's")
    monkeypatch.setattr("resnet_fast.common.files.unfinished_name", lambda path: trap)
    with pytest.raises(FileExistsError), whole_file(tmp_path / "file") as file:
        file.write(b"ours")
    assert target.read_text() == "somebody's" and not (tmp_path / "file").exists()


def test_it_has_the_permissions_of_any_new_file(tmp_path: Path):
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_what_a_killed_process_left_is_found(tmp_path: Path):
    path = tmp_path / "[a]*.pt"
    left, other = unfinished_name(path), unfinished_name(tmp_path / "a.pt")
    left.touch()
    other.touch()
    delete_unfinished(path)
    assert list(tmp_path.iterdir()) == [other]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """A limit on the size of files, which fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("n_bytes", [2000, 2_000_000], ids=["when it is flushed", "when it is written"])
def test_a_full_disk_names_the_file(n_bytes: int, tmp_path: Path, small_disk: None):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(OSError) as caught, whole_file(path) as file:
        file.write(bytes(n_bytes))
    assert str(caught.value) == f"[Errno {errno.EFBIG}] File too large: '{path}'"
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_gone_is_named_by_the_file_that_was_to_be_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"'{tmp_path / 'gone' / 'file'}'")):
        with whole_file(tmp_path / "gone" / "file"):
            pass


def test_an_error_about_another_file_keeps_its_name(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="'another'"), whole_file(tmp_path / "file"):
        open("another")
