"""A small image registry that is only read, with tokens or passwords, blobs behind a redirect, and `Faults`; and what to put into it.

    python -m tests.runtime.registry_server FOLDER --port 8080 --password PASSWORD

serves FOLDER as the artifact team/tiny:v1 on all addresses, for pods of a cluster; with --image as an image that nodes can mount.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.runtime.file_server import Faults, FaultyHandler, serve

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
TAR = "application/vnd.oci.image.layer.v1.tar"
TITLE = "org.opencontainers.image.title"
USER = "robot"
REPOSITORY = "team/tiny"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Images(Faults):
    """One repository, `team/tiny`."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    """By digest and by tag."""
    password: str = ""
    """If set, whoever pulls needs it."""
    scheme: str = "Bearer"
    """... or Basic."""
    token_lasts: int = 1000
    """Requests that a token is good for."""
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, data: bytes, media_type: str, **annotations: str) -> dict[str, Any]:
        """A blob's descriptor."""
        self.blobs[digest_of(data)] = data
        notes = {"annotations": annotations} if annotations else {}
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **notes}

    def tag(self, layers: list[dict[str, Any]], name: str = "v1", **more: Any) -> str:
        """The digest of a manifest of `layers`, which has the tag."""
        config = self.add(b"{}", "application/vnd.oci.empty.v1+json")
        return self.put({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers, **more}, name)

    def put(self, manifest: Mapping[str, Any], name: str = "") -> str:
        body = json.dumps(manifest).encode()
        self.manifests |= {digest_of(body): body, **({name: body} if name else {})}
        return digest_of(body)


def tar_of(files: Mapping[str, bytes], *, compress: bool = False) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files.items():
            item = tarfile.TarInfo(name)
            item.size, item.mode = len(data), 0o644
            archive.addfile(item, io.BytesIO(data))
    return gzip.compress(stream.getvalue(), 1) if compress else stream.getvalue()


def push_artifact(images: Images, files: Mapping[str, bytes]) -> str:
    """As `oras push` does: a layer a file, with its name as a title."""
    return images.tag([images.add(data, TAR, **{TITLE: name}) for name, data in files.items()])


def push_image(images: Images, files: Mapping[str, bytes], folder: str = "models") -> str:
    """As `docker push` does: the first layer has one file, the second one, compressed, the others; both are in the configuration."""
    names = sorted(files)
    contents = [{f"{folder}/{name}": files[name] for name in part} for part in (names[:1], names[1:])]
    plain = [tar_of(part) for part in contents]
    layers = [images.add(plain[0], TAR), images.add(gzip.compress(plain[1], 1), f"{TAR}+gzip")]
    filesystem = {"type": "layers", "diff_ids": [digest_of(tar) for tar in plain]}
    config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": filesystem}).encode()
    return images.tag(layers, config=images.add(config, IMAGE_CONFIG))


@contextmanager
def serve_images(images: Images, *, context: Any = None) -> Iterator[Images]:
    with serve(images, _Handler, context=context):
        yield images


class _Handler(FaultyHandler):
    state: Images

    def route(self) -> None:
        images, parts = self.state, urlsplit(self.path)
        path = parts.path
        self.note(path)
        if path.startswith("/storage/"):
            self.send_file(images.blobs[path.removeprefix("/storage/")], large=True)
        elif self.refused():
            return
        elif path == "/token":
            self._token(parse_qs(parts.query))
        elif not self._may_pull():
            challenge = f'Bearer realm="{self._origin()}/token",service="tests",scope="repository:{REPOSITORY}:pull"'
            self.send(401, {"WWW-Authenticate": challenge if images.scheme == "Bearer" else 'Basic realm="tests"'})
        elif path.startswith(f"/v2/{REPOSITORY}/manifests/") and (body := images.manifests.get(path.rpartition("/")[2])):
            self.send(200, {"Content-Type": json.loads(body)["mediaType"], "Docker-Content-Digest": digest_of(body)}, body)
        elif path.startswith(f"/v2/{REPOSITORY}/blobs/") and path.rpartition("/")[2] in images.blobs:
            host = self.headers["Host"].replace("127.0.0.1", "localhost")
            self.send(307, {"Location": f"{self._origin(host)}/storage/{path.rpartition('/')[2]}?X-Amz-Signature=5ec2e75160a7e3e"})
        else:
            self.send(404)

    def do_POST(self) -> None:
        """A token for an identity token, as registries of clouds hand them out."""
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if form.get("grant_type") == ["refresh_token"] and form.get("refresh_token") == [self.state.password] and "service" in form:
            self._hand_out("access_token")
        else:
            self.send(401)

    def _origin(self, host: str = "") -> str:
        return f"{self.state.url.partition('://')[0] or 'http'}://{host or self.headers['Host']}"

    def _may_pull(self) -> bool:
        images, given = self.state, self.headers.get("Authorization", "")
        if not images.password:
            return True
        if images.scheme == "Basic":
            return given == self._basic()
        token = given.removeprefix("Bearer ")
        images.tokens[token] = images.tokens.get(token, 0) - 1
        return images.tokens[token] >= 0

    def _basic(self) -> str:
        return "Basic " + base64.b64encode(f"{USER}:{self.state.password}".encode()).decode()

    def _token(self, query: Mapping[str, list[str]]) -> None:
        wanted = {"service": ["tests"], "scope": [f"repository:{REPOSITORY}:pull"]}
        if self.headers.get("Authorization") != self._basic() or query != wanted:
            self.send(401)
            return
        self._hand_out("token")

    def _hand_out(self, name: str) -> None:
        token = f"token-{len(self.state.tokens)}"
        self.state.tokens[token] = self.state.token_lasts
        self.send(200, {"Content-Type": "application/json"}, json.dumps({name: token}).encode())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--password", default="")
    parser.add_argument("--image", action="store_true")
    options = parser.parse_args()
    images = Images(password=options.password)
    push = push_image if options.image else push_artifact
    push(images, {file.name: file.read_bytes() for file in options.folder.iterdir() if file.is_file()})
    ThreadingHTTPServer(("", options.port), type("Handler", (_Handler,), {"state": images})).serve_forever()


if __name__ == "__main__":
    main()
