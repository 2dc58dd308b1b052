"""A small server that speaks the hub's HTTP: listing, `resolve` with its headers, redirects to a storage host, ranges, and faults.

Large files (safetensors) live behind a redirect to another host name, as a hub's do; that host must never see a token.

    python -m tests.runtime.hub_server FOLDER --port 8080 --token SECRET

serves FOLDER as `org/name` on all addresses, for pods of a cluster.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIGNATURE = "X-Amz-Signature=5ec2e75160a7e3e"


@dataclass
class Hub:
    """One repository, `org/name`, and what goes wrong with it."""

    files: Mapping[str, bytes]
    token: str = ""
    """If set, requests without it get 401."""
    rate_limited: int = 0
    """So many requests get 429."""
    failures: int = 0
    """So many requests get 503."""
    cut_after: int = 0
    """The connection of a large file's body is closed after so many bytes ..."""
    cuts: int = 0
    """... so many times."""
    stall_after: int = -1
    """Bytes of a large file after which nothing more is sent, until `released` is set."""
    released: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str, bool]] = field(default_factory=list)
    """(method, path, Range, whether a token came along)"""
    url: str = ""

    def seen(self, part: str) -> list[tuple[str, str, str, bool]]:
        return [request for request in self.requests if part in request[1]]


@contextmanager
def serve_hub(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range", ""), "Authorization" in self.headers))
        if path.startswith("/storage/"):
            self._send_body(next(data for data in hub.files.values() if hashlib.sha256(data).hexdigest() == path[9:]), large=True)
        elif hub.rate_limited > 0:
            hub.rate_limited -= 1
            self._send(429, {"Retry-After": "0"})
        elif hub.failures > 0:
            hub.failures -= 1
            self._send(503)
        elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._send(401, {"X-Error-Code": "RepoNotFound"})
        elif path in (f"/api/models/org/name/revision/{name}" for name in ("main", COMMIT)):
            self._send(200, {"Content-Type": "application/json"}, json.dumps(self._listing()).encode())
        elif path.startswith(f"/org/name/resolve/{COMMIT}/") and path.rpartition("/")[2] in hub.files:
            self._resolve(path.rpartition("/")[2])
        else:
            self._send(404, {"X-Error-Code": "RevisionNotFound" if "org/name" in path else "RepoNotFound"})

    def _listing(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.hub.files.items():
            item: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _blob(data)}
            if name.endswith(".safetensors"):
                item["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(item)
        return {"id": "org/name", "sha": COMMIT, "siblings": [*siblings, {"rfilename": "folder/other.bin", "size": 3, "blobId": "0"}]}

    def _resolve(self, name: str) -> None:
        data = self.hub.files[name]
        if not name.endswith(".safetensors"):
            self._send_body(data, {"X-Repo-Commit": COMMIT, "ETag": f'"{_blob(data)}"'})
            return
        digest = hashlib.sha256(data).hexdigest()
        host = self.headers["Host"].replace("127.0.0.1", "localhost")
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "ETag": '"pointer"'}
        self._send(302, {**headers, "Location": f"http://{host}/storage/{digest}?{SIGNATURE}"})

    def _send_body(self, data: bytes, headers: Mapping[str, str] | None = None, *, large: bool = False) -> None:
        start, end, status, extra = 0, len(data), 200, dict(headers or {})
        if wanted := self.headers.get("Range", "").removeprefix("bytes="):
            first, _, last = wanted.partition("-")
            start, end, status = int(first), min(len(data), int(last) + 1 if last else len(data)), 206
            extra["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        is_download = large and self.command == "GET" and end - start > 1 << 16  # not a look at a header
        if is_download and self.hub.cuts > 0:
            self.hub.cuts -= 1
            self._send(status, extra, data[start:end], sent=self.hub.cut_after)
        elif is_download and self.hub.stall_after >= 0:
            self._send(status, extra, data[start:end], sent=self.hub.stall_after, stall=True)
        else:
            self._send(status, extra, data[start:end])

    def _send(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"", sent: int = -1, stall: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(body if sent < 0 else body[:sent])
            self.wfile.flush()
            if stall:
                self.hub.stalled.set()
                self.hub.released.wait(60)
        except OSError:
            pass
        if sent >= 0:
            self.close_connection = True


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token", default="")
    options = parser.parse_args()
    hub = Hub({file.name: file.read_bytes() for file in options.folder.iterdir() if file.is_file()}, token=options.token)
    ThreadingHTTPServer(("", options.port), type("Handler", (_Handler,), {"hub": hub})).serve_forever()


if __name__ == "__main__":
    main()
