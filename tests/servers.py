"""Servers of this machine: files over HTTP with faults, and S3."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Files:
    """A folder over HTTP. `asked`: (path, whether for some bytes alone, who asks) of each request.

    `faults`: of a path, what happens to its next requests, one each: `cut` off in the middle, `slow`, or a status.
    `always`: what happens to each request of a path. `ranges`: whether parts of files are sent.
    """

    root: Path
    address: str = ""
    ranges: bool = True
    asked: list[tuple[str, bool, str]] = field(default_factory=list)
    faults: dict[str, list[str | int]] = field(default_factory=dict)
    always: dict[str, str | int] = field(default_factory=dict)

    def whole(self, who: str | None = None) -> Counter[str]:
        """How often each file was asked for as a whole."""
        return Counter(path for path, part, by in self.asked if not part and who in (None, by))

    def parts(self) -> Counter[str]:
        """How often some bytes of each file were asked for."""
        return Counter(path for path, part, _ in self.asked if part)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.lstrip("/")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", "")) if self.ranges else None
        self.asked.append((path, wanted is not None, request.headers.get("X-Who", "")))
        todo = self.faults.get(path)
        fault = todo.pop(0) if todo else self.always.get(path)
        file = self.root / path
        if isinstance(fault, int) or not file.is_file():
            request.send_error(fault if isinstance(fault, int) else 404)
            return
        data = file.read_bytes()
        if wanted:
            data = data[int(wanted[1]) : int(wanted[2]) + 1]
        request.send_response(206 if wanted else 200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if fault == "cut":
            data = data[: len(data) // 2]
        half = len(data) // 2 if fault == "slow" else len(data)
        request.wfile.write(data[:half])
        if fault == "slow":
            request.wfile.flush()
            time.sleep(0.4)
            request.wfile.write(data[half:])
        request.close_connection = fault == "cut"


@contextmanager
def serving(root: Path) -> Iterator[Files]:
    """A folder over HTTP."""
    files = Files(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            files.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with _running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        files.address = f"http://127.0.0.1:{port}"
        yield files


@contextmanager
def _running(server: ThreadingHTTPServer) -> Iterator[int]:
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of an S3 server; it takes any credentials."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()
