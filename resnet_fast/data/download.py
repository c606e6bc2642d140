"""Download a file completely, or not at all.

    download(["https://fast.example/x.tar.gz", "https://first.example/x.tar.gz"], Path("data/x.tar.gz"), md5)

The servers are tried in this order. The bytes go to a hidden file next to the target, `.x.tar.gz.part`. After an
interruption the next request, to any server and from any later process, asks only for the missing bytes (HTTP Range).
The file is renamed to its target if its MD5 matches. Otherwise what the last server sent is deleted.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

# tqdm if it is installed, else a simple percentage; torchvision imports it from here, too.
from torch.hub import tqdm  # type: ignore[attr-defined]
from torchvision.datasets.utils import check_integrity

from resnet_fast._version import __version__
from resnet_fast.common.checks import one_line

TIMEOUT = 30.0  # seconds without a byte
PATIENCE = 20.0  # seconds before a server's speed is judged
LEAST_SPEED = 100_000  # bytes/s; CIFAR-10's own server, tried last, delivers 66,000 to 85,000
TRIES = 5  # requests to one server, as long as each delivers some bytes
CHUNK = 2**18  # bytes


class DownloadError(Exception):
    """No server delivered the file; the message has a reason for each."""


class _ServerError(Exception):
    """A server does not deliver the file, or not all of it."""


class _SlowServerError(_ServerError):
    """The download would take too long."""


def download(urls: Sequence[str], target: Path, md5: str) -> None:
    """Download a file to `target`, whose folder must exist.

    Args:
        urls: URLs of the file, in the order in which to try them. A slow server is given up, except the last.
        target: path of the file.
        md5: MD5 of the file, in hexadecimal digits.

    Raises:
        DownloadError: no server delivered the file. The bytes received are kept next to `target` for the next call.
        OSError: the file cannot be written.
    """
    partial = target.with_name(f".{target.name}.part")
    reasons = []
    for url in urls:
        reason = _fetch(url, partial, md5, may_be_slow=url == urls[-1])
        if reason is None:
            os.replace(partial, target)
            return
        reasons.append(f"{url}: {reason}")
    size = _size(partial)
    kept = [f"the {size:,} bytes received are kept for the next attempt"] if size else []
    raise DownloadError("; ".join(reasons + kept))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch(url: str, partial: Path, md5: str, may_be_slow: bool) -> str | None:
    """Complete `partial` from one server; return None, or the reason why that failed."""
    reason, restarted = "", False
    earlier = _size(partial)  # bytes of other servers, which this one must not destroy
    anew = partial.with_suffix(".anew")
    anew.unlink(missing_ok=True)  # of a process that was killed
    for _ in range(TRIES):
        before = _size(partial)
        try:
            path = _receive(url, partial, anew, 0 if restarted and before == earlier else before, may_be_slow)
        except _ServerError as error:
            if check_integrity(partial, md5):  # an answer without a length may be whole
                return None
            reason = str(error)
            if isinstance(error, _SlowServerError) or _size(partial) <= before:
                break
            continue
        if check_integrity(path, md5):
            os.replace(path, partial)
            return None
        reason = f"sends another file: its MD5 is not {md5}"
        if path == anew or not earlier:
            path.unlink()
        else:
            os.truncate(partial, earlier)
        if path == anew or restarted or not before:
            break
        restarted = True  # the wrong bytes may come from an earlier request
    return reason


def _receive(url: str, partial: Path, anew: Path, start: int, may_be_slow: bool) -> Path:
    """Append the bytes from `start` on to `partial`; return the path of the file that is complete now.

    An answer that does not continue `partial` goes to `anew`. If it is cut, the longer of the two becomes `partial`.
    """
    request = Request(url, headers={"User-Agent": f"resnet-fast/{__version__}"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with _server_errors():
        try:
            response = urlopen(request, timeout=TIMEOUT)  # follows redirections
        except HTTPError as error:
            if start and error.code == 416:  # no bytes are missing: the file is complete, or wrong
                return partial
            raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise _ServerError("sends a web page instead of the file")
        if response.status != 206:
            start = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise _ServerError("sends another part of the file than requested")
        print(f"downloading {url}" + (f", from byte {start:,} on" if start else ""), file=sys.stderr)
        if start or not _size(partial):
            _save(response, partial, start, may_be_slow)
            return partial
        try:
            _save(response, anew, 0, may_be_slow)
        except BaseException:  # Ctrl-C, too
            if _size(anew) > _size(partial):
                os.replace(anew, partial)
            else:
                anew.unlink(missing_ok=True)
            raise
        return anew


def _save(response: Any, path: Path, start: int, may_be_slow: bool) -> None:
    """Write an answer to a file, after its first `start` bytes."""
    length = response.headers.get("Content-Length", "")
    total = start + int(length) if length.isdecimal() else None
    received, began = 0, time.monotonic()
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=not (sys.stderr and sys.stderr.isatty()))
    with bar, open(path, "ab" if start else "wb") as file:
        while total is None or start + received < total:
            with _server_errors():
                chunk = response.read1(CHUNK)
            if not chunk:
                break
            file.write(chunk)
            received += len(chunk)
            bar.update(len(chunk))
            seconds = time.monotonic() - began
            if not may_be_slow and seconds > PATIENCE and received < LEAST_SPEED * seconds:
                raise _SlowServerError(f"gives {received / seconds / 1000:.0f} kB/s, too slow")
    if total is not None and start + received < total:
        raise _ServerError(f"ends after {start + received:,} of {total:,} bytes")
    if total is None and not response.chunked:
        raise _ServerError(f"ends after {start + received:,} bytes without saying whether these are all")


@contextmanager
def _server_errors() -> Iterator[None]:
    """Turn errors of the network into a _ServerError."""
    try:
        yield
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a redirect to an invalid URL
        reason = getattr(error, "reason", None)  # a URLError's own text has brackets around it
        text = one_line(reason if isinstance(reason, Exception) else error)
        raise _ServerError(text.partition(" The last 30x error")[0]) from error  # a circle: urllib repeats "Found"
