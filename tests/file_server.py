"""A local web server whose answers a test chooses: complete, cut off, slow, wrong, redirected."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STEP = 4096  # bytes that are sent at once


@dataclass
class Answer:
    """What a path is answered with.

    Args:
        content: the bytes of the file.
        ranges: whether a request for a part gets that part.
        cut_after: bytes after which the connection is closed, though more were announced.
        pause: seconds before each 4,096 bytes.
        status: another status than 200 and 206, without content.
        location: where a redirection leads.
    """

    content: bytes = b""
    ranges: bool = True
    cut_after: int | None = None
    pause: float = 0.0
    status: int = 200
    location: str = ""
    content_type: str = "application/gzip"
    announces_length: bool = True


class FileServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, str | None]] = []  # path and Range of each

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client may leave."""


class _Handler(BaseHTTPRequestHandler):
    server: FileServer  # type: ignore[assignment]

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        answer = self.server.answers.get(self.path.partition("?")[0], Answer(status=404))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and answer.ranges else 0
        status = answer.status
        if status == 200 and wanted and answer.ranges:
            status = 206 if start < len(answer.content) else 416
        self.send_response(status)
        if answer.location:
            self.send_header("Location", answer.location)
        content = answer.content[start:] if status in (200, 206) else b""
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(answer.content) - 1}/{len(answer.content)}")
        self.send_header("Content-Type", answer.content_type)
        if answer.announces_length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for i in range(0, len(content[: answer.cut_after]), STEP):
            time.sleep(answer.pause)
            self.wfile.write(content[: answer.cut_after][i : i + STEP])

    def log_message(self, format: str, *args: object) -> None:
        """Write no log."""


@contextmanager
def serving() -> Iterator[FileServer]:
    """Run a server for the length of the block."""
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
