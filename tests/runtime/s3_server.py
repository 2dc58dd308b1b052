"""A small server that speaks S3's HTTP for one bucket: signatures are verified, listings paged, and what goes wrong is `Faults`.

The signature is computed here from the request as it arrived, by AWS's description and by none of the runtime's code.

    python -m tests.runtime.s3_server FOLDER --port 8080 --secret SECRET

serves FOLDER below s3://models/tiny on all addresses, for pods of a cluster.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.runtime.file_server import Faults, FaultyHandler, serve

ACCESS_KEY = "AKIAEXAMPLE"


@dataclass
class Store(Faults):
    """One bucket, `models`."""

    objects: dict[str, bytes] = field(default_factory=dict)
    secret: str = ""
    """If set, requests that are not signed with it get 403."""
    session_token: str = ""
    region: str = "us-east-1"
    checksums: bool = False
    """Whether objects have a SHA-256 of their own."""
    parts: bool = False
    """Whether ETags are those of objects that were uploaded in parts."""
    page: int = 1000

    def etag(self, key: str) -> str:
        digest = hashlib.md5(self.objects[key]).hexdigest()
        return f'"{hashlib.md5(digest.encode()).hexdigest()}-2"' if self.parts else f'"{digest}"'


@contextmanager
def serve_store(store: Store, *, context: Any = None) -> Iterator[Store]:
    with serve(store, _Handler, context=context):
        yield store


class _Handler(FaultyHandler):
    state: Store

    def route(self) -> None:
        store, parts = self.state, urlsplit(self.path)
        path = unquote(parts.path)
        self.note(path)
        if self.refused():
            return
        if refusal := self._refusal(parts.path, parts.query):
            self._error(*refusal)
        elif path == "/models/" and self.command == "GET":
            self._list(dict(parse_qsl(parts.query, keep_blank_values=True)))
        elif path.startswith("/models/") and path.removeprefix("/models/") in store.objects:
            self._object(path.removeprefix("/models/"))
        else:
            self._error(404, "NoSuchKey" if path.startswith("/models/") else "NoSuchBucket")

    def _refusal(self, path: str, query: str) -> tuple[int, str] | None:
        store, header = self.state, self.headers.get("Authorization", "")
        if not store.secret:
            return None
        if not header:
            return 403, "AccessDenied"
        scheme, _, rest = header.partition(" ")
        fields = dict(part.strip().split("=", 1) for part in rest.split(","))
        access, date, region, service, _ = fields["Credential"].split("/")
        if scheme != "AWS4-HMAC-SHA256" or access != ACCESS_KEY:
            return 403, "InvalidAccessKeyId"
        if region != store.region:
            return 400, "AuthorizationHeaderMalformed"
        if store.session_token and self.headers.get("x-amz-security-token") != store.session_token:
            return 400, "InvalidToken"
        names = fields["SignedHeaders"].split(";")
        if not {"host", "x-amz-content-sha256", "x-amz-date"} <= set(names):
            return 403, "SignatureDoesNotMatch"
        arguments = sorted((quote(k, safe="~"), quote(v, safe="~")) for k, v in parse_qsl(query, keep_blank_values=True))
        canonical = [self.command, quote(unquote(path), safe="/~"), "&".join(f"{k}={v}" for k, v in arguments)]
        canonical += [f"{name}:{' '.join(self.headers[name].split())}" for name in names]
        canonical += ["", fields["SignedHeaders"], self.headers["x-amz-content-sha256"]]
        request = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
        to_sign = f"AWS4-HMAC-SHA256\n{self.headers['x-amz-date']}\n{date}/{region}/{service}/aws4_request\n{request}"
        key = ("AWS4" + store.secret).encode()
        for part in (date, region, service, "aws4_request"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        expected = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
        return None if hmac.compare_digest(expected, fields["Signature"]) else (403, "SignatureDoesNotMatch")

    def _list(self, query: dict[str, str]) -> None:
        store, prefix = self.state, query.get("prefix", "")
        keys = [key for key in sorted(store.objects) if key.startswith(prefix) and "/" not in key.removeprefix(prefix)]
        first = int(query.get("continuation-token", "0"))
        shown = keys[first : first + store.page]
        more = first + store.page < len(keys)
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(store.etag(key), {chr(34): '&quot;'})}</ETag><Size>{len(store.objects[key])}</Size></Contents>"
            for key in shown
        )
        token = f"<NextContinuationToken>{first + store.page}</NextContinuationToken>" if more else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>models</Name><KeyCount>{len(shown)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>{token}{items}"
            "</ListBucketResult>"
        )
        self.send(200, {"Content-Type": "application/xml"}, body.encode())

    def _object(self, key: str) -> None:
        data, etag = self.state.objects[key], self.state.etag(key)
        if self.headers.get("If-Match", etag) != etag:
            self._error(412, "PreconditionFailed")
            return
        headers = {"ETag": etag}
        if self.state.checksums and self.headers.get("x-amz-checksum-mode") == "ENABLED":
            headers["x-amz-checksum-sha256"] = base64.b64encode(hashlib.sha256(data).digest()).decode()
        self.send_file(data, headers, large=key.endswith(".safetensors"))

    def _error(self, status: int, code: str) -> None:
        headers = {"x-amz-bucket-region": self.state.region} if code == "AuthorizationHeaderMalformed" else {}
        body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>no</Message></Error>'
        self.send(status, headers, b"" if self.command == "HEAD" else body.encode())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--secret", default="")
    parser.add_argument("--bytes-per-s", type=int, default=0)
    options = parser.parse_args()
    objects = {f"tiny/{file.name}": file.read_bytes() for file in options.folder.iterdir() if file.is_file()}
    store = Store(objects=objects, secret=options.secret, bytes_per_s=options.bytes_per_s)
    ThreadingHTTPServer(("", options.port), type("Handler", (_Handler,), {"state": store})).serve_forever()


if __name__ == "__main__":
    main()
