"""The objects right below a path of a bucket, of any S3 endpoint (`s3_client.py` has the variables).

A bucket has no commits. The state of a source is a hash over the names, sizes and ETags of the model's objects (`revision`), and each
request asks for the ETag that was listed, so that an object that is replaced meanwhile is noticed by its first byte.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from gantline_runtime.checkpoint.files import MAX_FILES, quote
from gantline_runtime.errors import CheckpointError, SourceError
from gantline_runtime.sources.patience import Refused, Service, persist
from gantline_runtime.sources.remote import DOWNLOADS, RemoteFile, Room, is_file_name, is_of_model
from gantline_runtime.sources.s3_client import Bucket, open_bucket
from gantline_runtime.sources.transfer import Downloaded, download_all, read_range, resume_file
from gantline_runtime.sources.uri import S3Location
from gantline_runtime.sources.web import skipped

__all__ = ["S3Files"]

_ENCRYPTION = "x-amz-server-side-encryption"


class S3Files:
    """Raises SourceError: DownloadUnauthorized (401, 403), ModelNotFound (404, or nothing below the path), DownloadRateLimited,
    DownloadStalled; CheckpointError where objects are not those that `revision` stands for, or change while they are read."""

    def __init__(self, location: S3Location, revision: str = "") -> None:
        self.name = f"{location.bucket}/{location.prefix}".rstrip("/")
        self.label = f"s3://{self.name}"
        self._prefix, self._bucket = location.prefix, open_bucket(location.bucket)
        self.service = _service(self.label, self._bucket)
        self._etags: dict[str, str] = {}
        self.files: Mapping[str, RemoteFile] = self._list()
        if not self.files:
            raise SourceError(f"{self.label} has no objects", cure="Check bucket and path; the model's files lie right below it.")
        self.sizes: Mapping[str, int] = {file.name: file.size for file in self.files.values()}
        self.revision = self._state()
        if revision and revision != self.revision:
            raise self._changed("its objects are not those that were inspected")
        endpoint = self._bucket.endpoint or "s3.amazonaws.com"
        self.inputs = {"endpoint": endpoint, "bucket": location.bucket, "prefix": location.prefix, "revision": self.revision}

    def read(self, name: str, start: int, length: int) -> bytes:
        return read_range(self.service, partial(self._open, name), start, length)

    def room(self, wanted: Sequence[RemoteFile]) -> Room:
        total = sum(file.size for file in wanted)
        return Room(total, total)

    def download(self, wanted: Sequence[RemoteFile], folder: Path, downloaded: Downloaded) -> Sequence[RemoteFile]:
        download_all([partial(self._download, file, folder, downloaded) for file in wanted], downloaded)
        return [self._with_hash(file) for file in wanted]

    def _download(self, file: RemoteFile, folder: Path, downloaded: Downloaded) -> None:
        target = folder / file.name
        if target.exists() and target.stat().st_size == file.size:
            downloaded.found(file.size)
            return
        # The ETag is in the partial file's name: bytes of a former state are not gone on with.
        passing = folder / DOWNLOADS / f"{file.name}.{hashlib.sha256(self._etags[file.name].encode()).hexdigest()[:16]}"
        resume_file(self.service, partial(self._open, file.name), passing, file.size, downloaded)
        if not downloaded.cancelled.is_set():
            passing.rename(target)

    def _list(self) -> dict[str, RemoteFile]:
        found: dict[str, RemoteFile] = {}
        seen, token = 0, ""
        while True:
            page = persist(self.service, partial(self._bucket.list, self._prefix, token))
            for item in page.objects:
                name = item.key.removeprefix(self._prefix)
                if item.key.startswith(self._prefix) and is_file_name(name) and item.size >= 0:
                    found[name], self._etags[name] = RemoteFile(name, item.size), item.etag
            seen, token = seen + max(1, len(page.objects)), page.next
            if seen > MAX_FILES:
                raise CheckpointError(f"{self.label} has more than {MAX_FILES} objects", cure="Give the path that has one model's files.")
            if not token:
                return found

    @contextmanager
    def _open(self, name: str, start: int, end: int) -> Iterator[Iterable[bytes]]:
        condition = {"If-Match": self._etags[name]} if self._etags.get(name) else {}
        try:
            with self._bucket.get(self._prefix + name, {"Range": f"bytes={start}-{end - 1}", **condition}) as answer:
                yield skipped(answer, start)
        except Refused as refused:
            if refused.status == 412:
                raise self._changed(f"{quote(name)} was replaced while it was read") from None
            raise

    def _with_hash(self, file: RemoteFile) -> RemoteFile:
        """With a hash to verify, where the endpoint has one of the whole object: S3's own SHA-256, or an ETag that is an MD5."""
        ask = partial(self._bucket.head, self._prefix + file.name, {"x-amz-checksum-mode": "ENABLED"})
        head = persist(self.service, ask)
        etag = head.get("ETag", "")
        if etag != self._etags[file.name]:
            raise self._changed(f"{quote(file.name)} was replaced while it was fetched")
        try:
            checksum = base64.b64decode(head.get("x-amz-checksum-sha256", ""), validate=True).hex()
        except binascii.Error:
            checksum = ""  # of parts: "...=-3"
        if len(checksum) == 64:
            return replace(file, sha256=checksum)
        encrypted = head.get(f"{_ENCRYPTION}-customer-algorithm") or head.get(_ENCRYPTION, "").startswith("aws:")
        md5 = re.fullmatch(r'"?([0-9a-f]{32})"?', etag.lower())
        return replace(file, md5=md5[1]) if md5 and not encrypted else file

    def _state(self) -> str:
        digest = hashlib.sha256()
        for name, file in sorted(self.files.items()):
            if is_of_model(name):
                digest.update(f"{name}\0{file.size}\0{self._etags[name]}\n".encode())
        return digest.hexdigest()[:40]

    def _changed(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.label} changed: {what}", cure="Have it inspected anew: set the annotation gantline.io/restartedAt.")


def _service(label: str, bucket: Bucket) -> Service:
    return Service(
        label, "the S3 endpoint", "the keys given may not read it" if bucket.keys else "no keys were given",
        "Give keys that may list the bucket and read its objects (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the secretRef).",
        "does not exist", "Check the network, proxies, AWS_ENDPOINT_URL and AWS_REGION.",
    )  # fmt: skip
