"""The three requests of S3's protocol that reading takes, to any endpoint: list, get a range, and ask about an object.

    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN    none: requests are not signed, as for public buckets
    AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL                          another endpoint than AWS's
    AWS_REGION, AWS_DEFAULT_REGION                                 default us-east-1; a bucket that lies elsewhere in AWS says so
    AWS_S3_ADDRESSING_STYLE                                        path or virtual; default virtual for AWS, path for others

Profiles of ~/.aws and the machine's own role are not used: a pod does not borrow its node's credentials.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from xml.etree import ElementTree

from gantline_runtime.checkpoint.files import quote
from gantline_runtime.errors import ConfigurationError
from gantline_runtime.sources.patience import Interrupted, Refused
from gantline_runtime.sources.s3_signature import Keys, encode_path, encode_query, sign
from gantline_runtime.sources.web import open_client, open_stream, take

if TYPE_CHECKING:
    import httpx

__all__ = ["Bucket", "ListedObject", "Page", "open_bucket"]

_PAGE = 1000
_MAX_PAGE_BYTES = 16 << 20
_MAX_ERROR_BYTES = 1 << 16
_REGION = re.compile(r"[a-z0-9-]{1,32}", re.ASCII)


@dataclass(frozen=True)
class ListedObject:
    key: str
    size: int
    etag: str


@dataclass(frozen=True)
class Page:
    objects: tuple[ListedObject, ...]
    next: str
    """Token of the next page, empty on the last one."""


@dataclass
class Bucket:
    """One bucket of an endpoint. Requests raise Refused and Interrupted."""

    name: str
    endpoint: str
    """Empty for AWS's own."""
    style: str
    keys: Keys
    region: str
    client: httpx.Client = field(repr=False)

    def list(self, prefix: str, token: str = "") -> Page:
        """The objects right below `prefix`, a thousand at a time."""
        query = {"list-type": "2", "delimiter": "/", "max-keys": str(_PAGE), "prefix": prefix}
        if token:
            query["continuation-token"] = token
        with self._open("GET", "", query, {}) as answer:
            body = take(answer, 0, _MAX_PAGE_BYTES)
        return _parse_page(body)

    @contextmanager
    def get(self, key: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        with self._open("GET", key, {}, headers) as answer:
            yield answer

    def head(self, key: str, headers: Mapping[str, str]) -> Mapping[str, str]:
        """The object's headers."""
        with self._open("HEAD", key, {}, headers) as answer:
            return answer.headers

    @contextmanager
    def _open(self, method: str, key: str, query: Mapping[str, str], headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """A bucket that lies in another region names it in its refusal, and is asked once more."""
        try:
            with self._send(method, key, query, headers) as answer:
                yield answer
                return
        except _OtherRegion as other:
            self.region = other.region
        with self._send(method, key, query, headers) as answer:
            yield answer

    @contextmanager
    def _send(self, method: str, key: str, query: Mapping[str, str], headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        url = self._address() + encode_path(key) + (f"?{encode_query(query)}" if query else "")
        signed = sign(method, url, headers, self.keys, self.region, datetime.now(UTC))
        with open_stream(self.client, url, signed, method=method, refusal=self._refusal) as answer:
            yield answer

    def _address(self) -> str:
        china = ".cn" if self.region.startswith("cn-") else ""
        parts = urlsplit(self.endpoint or f"https://s3.{self.region}.amazonaws.com{china}")
        base = parts.path.rstrip("/")
        if self.style == "virtual":
            return f"{parts.scheme}://{self.name}.{parts.netloc}{base}/"
        return f"{parts.scheme}://{parts.netloc}{base}/{self.name}/"

    def _refusal(self, answer: httpx.Response) -> Refused:
        region = answer.headers.get("x-amz-bucket-region", "")
        if answer.status_code in (301, 307, 400, 403) and region != self.region and _REGION.fullmatch(region):
            return _OtherRegion(region)
        code = _error_code(take(answer, 0, _MAX_ERROR_BYTES))
        status = 401 if code in ("ExpiredToken", "InvalidToken") else answer.status_code
        return Refused(status, answer.headers.get("Retry-After"), code)


class _OtherRegion(Refused):
    def __init__(self, region: str) -> None:
        super().__init__(301, code="PermanentRedirect")
        self.region = region


def open_bucket(name: str) -> Bucket:
    """With the environment's settings. Raises ConfigurationError."""
    environment = {key: value.strip() for key, value in os.environ.items() if key.startswith("AWS_")}
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
    if endpoint and (urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname):
        raise ConfigurationError("AWS_ENDPOINT_URL is no http address", cure="Give for instance https://minio.example:9000.")
    # A certificate for *.s3.amazonaws.com is none for a bucket with dots.
    style = environment.get("AWS_S3_ADDRESSING_STYLE") or ("path" if endpoint or "." in name else "virtual")
    if style not in ("path", "virtual"):
        raise ConfigurationError(f"AWS_S3_ADDRESSING_STYLE is {quote(style)}", cure="Give path or virtual.")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"
    if not _REGION.fullmatch(region):
        raise ConfigurationError(f"AWS_REGION is {quote(region)}", cure="Give for instance eu-central-1.")
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    keys = Keys(*(environment.get(name, "") for name in names))
    if bool(keys.access_key) != bool(keys.secret_key):
        cure = "Give both, or none for a public bucket."
        raise ConfigurationError("one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is missing", cure=cure)
    return Bucket(name, endpoint.rstrip("/"), style, keys, region, open_client(follow_redirects=False))


def _parse_page(body: bytes) -> Page:
    """Raises Interrupted for what is no listing: the proxies and login pages of this world."""
    try:
        if b"<!DOCTYPE" in body[:1024]:
            raise ValueError("a listing declares no types")
        root = ElementTree.fromstring(body)
        if not root.tag.endswith("ListBucketResult"):
            raise ValueError("another document")
        objects = tuple(
            ListedObject(_text(item, "Key"), int(_text(item, "Size")), _text(item, "ETag")) for item in root.iterfind("{*}Contents")
        )
        return Page(objects, _text(root, "NextContinuationToken") if _text(root, "IsTruncated") == "true" else "")
    except (ElementTree.ParseError, ValueError) as error:
        raise Interrupted(f"the answer is no listing of a bucket: {type(error).__name__}") from None


def _text(item: ElementTree.Element, name: str) -> str:
    return item.findtext(f"{{*}}{name}") or ""


def _error_code(body: bytes) -> str:
    match = re.search(rb"<Code>([A-Za-z0-9]{1,64})</Code>", body)
    return match[1].decode() if match else ""
