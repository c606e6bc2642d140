"""A download yields the complete file or none, from servers that are slow, interrupt, send wrong bytes or redirect."""

import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import Answer, FileServer, serving

from resnet_fast.data import download as module
from resnet_fast.data.download import DownloadError, download

CONTENT = random.Random(0).randbytes(50_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
NAME = "x.tar.gz"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        yield server


def fetch(server: FileServer, folder: Path, **answers: Answer) -> None:
    """Download from the paths with these answers, in order."""
    server.answers.update({f"/{name}": answer for name, answer in answers.items()})
    download([f"{server.url}/{name}" for name in answers], folder / NAME, MD5)


def assert_whole(folder: Path) -> None:
    assert (folder / NAME).read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == [NAME]


def part(folder: Path) -> Path:
    return folder / f".{NAME}.part"


@pytest.mark.parametrize("announces_length", [True, False])
def test_a_whole_file_gets_its_name(announces_length: bool, server: FileServer, tmp_path: Path):
    fetch(server, tmp_path, a=Answer(CONTENT, announces_length=announces_length), b=Answer(CONTENT))
    assert_whole(tmp_path)
    assert server.requests == [("/a", None)]


def test_after_a_cut_the_same_server_is_asked_for_the_rest(server: FileServer, tmp_path: Path):
    fetch(server, tmp_path, a=Answer(CONTENT, cut_after=20_000), b=Answer(CONTENT))
    assert_whole(tmp_path)
    assert server.requests == [("/a", None), ("/a", "bytes=20000-"), ("/a", "bytes=40000-")]


def test_a_server_that_is_always_cut_is_left_after_five_requests(server: FileServer, tmp_path: Path):
    fetch(server, tmp_path, a=Answer(CONTENT, cut_after=1000), b=Answer(CONTENT))
    assert_whole(tmp_path)
    assert server.requests == [("/a", None), *[("/a", f"bytes={i}000-") for i in range(1, 5)], ("/b", "bytes=5000-")]


def test_a_server_that_ignores_ranges_sends_all_of_it_again(server: FileServer, tmp_path: Path):
    part(tmp_path).write_bytes(CONTENT[:20_000])
    fetch(server, tmp_path, a=Answer(CONTENT, ranges=False))
    assert_whole(tmp_path)


def test_one_that_ignores_ranges_and_is_cut_is_not_asked_for_ever(server: FileServer, tmp_path: Path):
    with pytest.raises(DownloadError, match="ends after 20,000 of 50,000 bytes; the 20,000 bytes received are kept"):
        fetch(server, tmp_path, a=Answer(CONTENT, ranges=False, cut_after=20_000))
    assert len(server.requests) == 2


def test_other_bytes_are_deleted_and_the_next_server_is_asked(server: FileServer, tmp_path: Path):
    fetch(server, tmp_path, a=Answer(CONTENT[::-1]), b=Answer(CONTENT))
    assert_whole(tmp_path)
    assert server.requests == [("/a", None), ("/b", None)]


def test_a_wrong_beginning_is_not_blamed_on_who_sends_the_rest(server: FileServer, tmp_path: Path):
    part(tmp_path).write_bytes(CONTENT[:20_000][::-1])
    fetch(server, tmp_path, a=Answer(CONTENT))
    assert_whole(tmp_path)
    assert server.requests == [("/a", "bytes=20000-"), ("/a", None)]


@pytest.mark.parametrize("kept", [CONTENT, CONTENT + b"more"], ids=["whole", "too long"])
def test_a_part_that_nothing_follows(kept: bytes, server: FileServer, tmp_path: Path):
    """It was complete when the process was killed, or never belonged to the file."""
    part(tmp_path).write_bytes(kept)
    fetch(server, tmp_path, a=Answer(CONTENT))
    assert_whole(tmp_path)
    assert len(server.requests) == (1 if kept == CONTENT else 2)


def test_redirections_are_followed_also_for_the_rest(server: FileServer, tmp_path: Path):
    server.answers["/there"] = Answer(CONTENT, cut_after=30_000)
    fetch(server, tmp_path, a=Answer(status=302, location=f"{server.url}/there"))
    assert_whole(tmp_path)
    assert server.requests[2:] == [("/a", "bytes=30000-"), ("/there", "bytes=30000-")]


def test_a_silent_server_is_left(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    fetch(server, tmp_path, a=Answer(CONTENT, pause=1.0), b=Answer(CONTENT))
    assert_whole(tmp_path)


def test_a_slow_server_is_left_but_its_bytes_are_kept(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    fetch(server, tmp_path, a=Answer(CONTENT, pause=0.1), b=Answer(CONTENT))
    assert_whole(tmp_path)
    (_, first), (path, wanted) = server.requests
    assert first is None and path == "/b" and re.fullmatch("bytes=[1-9][0-9]*-", wanted or "")


def test_the_last_server_may_be_slow(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    monkeypatch.setattr(module, "LEAST_SPEED", 10**9)
    fetch(server, tmp_path, a=Answer(CONTENT, pause=0.01))
    assert_whole(tmp_path)


REFUSALS = {
    "wrong bytes": (Answer(CONTENT[:-1] + b"?"), f"sends another file: its MD5 is not {MD5}"),
    "short": (Answer(CONTENT[:-1]), f"sends another file: its MD5 is not {MD5}"),
    "empty": (Answer(b""), f"sends another file: its MD5 is not {MD5}"),
    "404": (Answer(status=404), "HTTP Error 404: Not Found"),
    "web page": (Answer(b"<html>Log in", content_type="text/html"), "sends a web page instead of the file"),
    "circle": (Answer(status=302, location="/a"), "HTTP Error 302: .* infinite loop\\.$"),
    "to a file": (Answer(status=302, location="file:///etc/hostname"), "HTTP Error 302: .*file:///etc/hostname"),
    "to no URL": (Answer(status=302, location="http://[::"), "Invalid"),
}


@pytest.mark.parametrize(("answer", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_server_without_the_file_is_named_and_nothing_stays(
    answer: Answer, reason: str, server: FileServer, tmp_path: Path
):
    with pytest.raises(DownloadError, match=f"^{server.url}/a: .*{reason}") as caught:
        fetch(server, tmp_path, a=answer)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_web_page_does_not_cost_what_is_there(server: FileServer, tmp_path: Path):
    part(tmp_path).write_bytes(CONTENT[:20_000])
    fetch(server, tmp_path, a=Answer(b"<html>Log in", ranges=False, content_type="text/html"), b=Answer(CONTENT))
    assert_whole(tmp_path)
    assert server.requests[-1] == ("/b", "bytes=20000-")


@pytest.mark.parametrize(
    "other",
    [
        Answer(b"rate limit", ranges=False, content_type="text/plain"),
        Answer(b"rate limit", ranges=False, announces_length=False),
        Answer(CONTENT, ranges=False, cut_after=1000),
        Answer(CONTENT[::-1], ranges=False),
        Answer(CONTENT[::-1]),
        Answer(CONTENT[:30_000]),
        Answer(CONTENT[:10]),
    ],
    ids=["text", "text without length", "cut", "wrong", "wrong rest", "too short", "nothing follows"],
)
def test_another_server_does_not_cost_what_is_there(other: Answer, server: FileServer, tmp_path: Path):
    part(tmp_path).write_bytes(CONTENT[:20_000])
    with pytest.raises(DownloadError, match="the 20,000 bytes received are kept for the next attempt$"):
        fetch(server, tmp_path, a=other)
    assert [path.name for path in tmp_path.iterdir()] == [f".{NAME}.part"]
    fetch(server, tmp_path, a=other, b=Answer(CONTENT))
    assert_whole(tmp_path)
    assert server.requests[-1] == ("/b", "bytes=20000-")


def test_an_answer_from_the_start_counts_once_it_is_longer(server: FileServer, tmp_path: Path):
    part(tmp_path).write_bytes(CONTENT[:20_000])
    fetch(server, tmp_path, a=Answer(CONTENT, ranges=False, cut_after=30_000), b=Answer(CONTENT))
    assert_whole(tmp_path)
    assert server.requests[-1] == ("/b", "bytes=30000-")


def test_without_a_length_a_cut_is_not_taken_for_another_file(server: FileServer, tmp_path: Path):
    cut = Answer(CONTENT, ranges=False, announces_length=False, cut_after=20_000)
    message = "/a: ends after 20,000 bytes without saying whether these are all; the 20,000 bytes received are kept"
    with pytest.raises(DownloadError, match=message):
        fetch(server, tmp_path, a=cut)
    fetch(server, tmp_path, a=cut, b=Answer(CONTENT))
    assert_whole(tmp_path)
    assert server.requests[-1] == ("/b", "bytes=20000-")


def test_the_error_has_every_server_with_its_reason(server: FileServer, tmp_path: Path):
    with pytest.raises(DownloadError) as caught:
        server.answers["/b"] = Answer(CONTENT[::-1])
        download([f"{server.url}/a", "http://127.0.0.1:1/x", f"{server.url}/b"], tmp_path / NAME, MD5)
    first, second, third = str(caught.value).split("; ")
    assert first == f"{server.url}/a: HTTP Error 404: Not Found"
    assert second == "http://127.0.0.1:1/x: [Errno 111] Connection refused"
    assert third == f"{server.url}/b: sends another file: its MD5 is not {MD5}"


def test_the_next_call_goes_on_where_the_last_one_failed(server: FileServer, tmp_path: Path):
    with pytest.raises(DownloadError, match="; the 5,000 bytes received are kept for the next attempt$"):
        fetch(server, tmp_path, a=Answer(CONTENT, cut_after=1000))
    assert [path.name for path in tmp_path.iterdir()] == [f".{NAME}.part"]
    fetch(server, tmp_path, a=Answer(CONTENT))
    assert_whole(tmp_path)
    assert server.requests[-1] == ("/a", "bytes=5000-")


def test_ctrl_c_leaves_no_file_of_that_name(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Interrupted(module.tqdm):
        def update(self, n: float | None = 1) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "tqdm", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(server, tmp_path, a=Answer(CONTENT))
    assert [path.name for path in tmp_path.iterdir()] == [f".{NAME}.part"]
    fetch(server, tmp_path, a=Answer(CONTENT))
    assert_whole(tmp_path)


def test_a_full_disk_is_not_blamed_on_the_servers(server: FileServer, tmp_path: Path):
    part(tmp_path).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        fetch(server, tmp_path, a=Answer(CONTENT), b=Answer(CONTENT))
    assert len(server.requests) == 1


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_bar_is_for_terminals(
    is_terminal: bool,
    server: FileServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    fetch(server, tmp_path, a=Answer(CONTENT))
    printed = capsys.readouterr().err
    assert printed.startswith(f"downloading {server.url}/a\n") and ("100%" in printed) is is_terminal
