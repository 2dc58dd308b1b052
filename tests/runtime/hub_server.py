"""A small server that speaks the hub's HTTP: listing, `resolve` with its headers, redirects to a storage host, ranges, and faults.

Large files (safetensors) live behind a redirect to another host name, as a hub's do; that host must never see a token.

    python -m tests.runtime.hub_server FOLDER --port 8080 --token SECRET

serves FOLDER as `org/name` on all addresses, for pods of a cluster.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.runtime.file_server import Faults, FaultyHandler, serve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIGNATURE = "X-Amz-Signature=5ec2e75160a7e3e"


@dataclass
class Hub(Faults):
    """One repository, `org/name`, and what goes wrong with it."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    token: str = ""
    """If set, requests without it get 401."""
    storage_rate_limited: int = 0
    """So many downloads of large files get 429."""


@contextmanager
def serve_hub(hub: Hub, *, context: Any = None) -> Iterator[Hub]:
    with serve(hub, _Handler, context=context):
        yield hub


class _Handler(FaultyHandler):
    state: Hub

    def route(self) -> None:
        hub, path = self.state, unquote(urlsplit(self.path).path)
        self.note(path)
        if path.startswith("/storage/") and hub.storage_rate_limited > 0 and not self.headers.get("Range"):
            hub.storage_rate_limited -= 1
            self.send(429, {"Retry-After": hub.retry_after})
        elif path.startswith("/storage/"):
            self.send_file(next(data for data in hub.files.values() if hashlib.sha256(data).hexdigest() == path[9:]), large=True)
        elif self.refused():
            return
        elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.send(401, {"X-Error-Code": "RepoNotFound"})
        elif path in (f"/api/models/org/name/revision/{name}" for name in ("main", COMMIT)):
            self.send(200, {"Content-Type": "application/json"}, json.dumps(self._listing()).encode())
        elif path.startswith(f"/org/name/resolve/{COMMIT}/") and path.rpartition("/")[2] in hub.files:
            self._resolve(path.rpartition("/")[2])
        else:
            self.send(404, {"X-Error-Code": "RevisionNotFound" if "org/name" in path else "RepoNotFound"})

    def _listing(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.state.files.items():
            item: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _blob(data)}
            if name.endswith(".safetensors"):
                item["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(item)
        return {"id": "org/name", "sha": COMMIT, "siblings": [*siblings, {"rfilename": "folder/other.bin", "size": 3, "blobId": "0"}]}

    def _resolve(self, name: str) -> None:
        data = self.state.files[name]
        if not name.endswith(".safetensors"):
            self.send_file(data, {"X-Repo-Commit": COMMIT, "ETag": f'"{_blob(data)}"'})
            return
        digest = hashlib.sha256(data).hexdigest()
        host = self.headers["Host"].replace("127.0.0.1", "localhost")
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "ETag": '"pointer"'}
        self.send(302, {**headers, "Location": f"{self.state.url.partition('://')[0] or 'http'}://{host}/storage/{digest}?{SIGNATURE}"})


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token", default="")
    parser.add_argument("--bytes-per-s", type=int, default=0)
    options = parser.parse_args()
    files = {file.name: file.read_bytes() for file in options.folder.iterdir() if file.is_file()}
    hub = Hub(files=files, token=options.token, bytes_per_s=options.bytes_per_s)
    ThreadingHTTPServer(("", options.port), type("Handler", (_Handler,), {"state": hub})).serve_forever()


if __name__ == "__main__":
    main()
