"""What the small servers of the tests share: bodies in ranges, and the faults that networks and busy servers have."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Faults:
    """What goes wrong, and what was asked. A body is a download when more than 64 KiB of a large file are asked for."""

    rate_limited: int = 0
    """So many requests get 429."""
    retry_after: str = "0"
    """Their Retry-After."""
    failures: int = 0
    """So many requests get 503."""
    cut_after: int = 0
    """The connection of a download is closed after so many bytes ..."""
    cuts: int = 0
    """... so many times."""
    stall_after: int = -1
    """Bytes of a download after which nothing more is sent, until `released` is set."""
    bytes_per_s: int = 0
    """How fast downloads are; 0 is as fast as can be."""
    corrupt: bool = False
    """Whether the last byte of a file is another one in a download."""
    released: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str, bool]] = field(default_factory=list)
    """(method, path, Range, whether an Authorization came along)"""
    url: str = ""

    def seen(self, part: str) -> list[tuple[str, str, str, bool]]:
        return [request for request in self.requests if part in request[1]]

    def starts(self, part: str) -> list[int]:
        """Where downloads of paths with `part` began: ranges that are longer than a look at a header."""
        ranges = [item[2].removeprefix("bytes=").split("-") for item in self.seen(part) if item[0] == "GET" and item[2]]
        return [int(first) for first, last in ranges if not last or int(last) - int(first) > 1 << 16]


@contextmanager
def serve(state: Any, handler: type[FaultyHandler], *, context: Any = None) -> Iterator[Any]:
    """`context`: an ssl.SSLContext, for HTTPS."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"state": state}))
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    state.url = f"{'https' if context is not None else 'http'}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class FaultyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Any

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def route(self) -> None:
        raise NotImplementedError

    def note(self, path: str) -> None:
        self.state.requests.append((self.command, path, self.headers.get("Range", ""), "Authorization" in self.headers))

    def refused(self) -> bool:
        """Whether a fault answered in the place of the server."""
        if self.state.rate_limited > 0:
            self.state.rate_limited -= 1
            self.send(429, {"Retry-After": self.state.retry_after})
        elif self.state.failures > 0:
            self.state.failures -= 1
            self.send(503)
        else:
            return False
        return True

    def send_file(self, data: bytes, headers: Mapping[str, str] | None = None, *, large: bool = False) -> None:
        start, end, status, extra = 0, len(data), 200, dict(headers or {})
        if wanted := self.headers.get("Range", "").removeprefix("bytes="):
            first, _, last = wanted.partition("-")
            start, end, status = int(first), min(len(data), int(last) + 1 if last else len(data)), 206
            if start >= len(data):
                self.send(416)
                return
            extra["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        is_download = large and self.command == "GET" and end - start > 1 << 16  # not a look at a header
        if is_download and self.state.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if is_download and self.state.cuts > 0:
            self.state.cuts -= 1
            self.send(status, extra, data[start:end], sent=self.state.cut_after)
        elif is_download and self.state.stall_after >= 0:
            self.send(status, extra, data[start:end], sent=self.state.stall_after, stall=True)
        else:
            self.send(status, extra, data[start:end], bytes_per_s=self.state.bytes_per_s if is_download else 0)

    def send(
        self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"", sent: int = -1, stall: bool = False,
        bytes_per_s: int = 0,
    ) -> None:  # fmt: skip
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self._write(body if sent < 0 else body[:sent], bytes_per_s)
            if stall:
                self.state.stalled.set()
                self.state.released.wait(60)
        except OSError:
            pass
        if sent >= 0:
            self.close_connection = True

    def _write(self, body: bytes, bytes_per_s: int) -> None:
        piece = bytes_per_s // 10 or max(1, len(body))
        for start in range(0, len(body), piece):
            self.wfile.write(body[start : start + piece])
            if bytes_per_s:
                time.sleep(0.1)
        self.wfile.flush()
