"""Where models come from: a folder, or a hub that speaks Hugging Face's HTTP.

    /path, ./path, file:///path      a folder of this machine (in a pod: of the image, or a mounted claim)
    hf://org/name                    a repository of $HF_ENDPOINT (default https://huggingface.co), with $HF_TOKEN if it is set

`HubFiles` reads pieces of files by range requests, so that a checkpoint is judged by its headers before anything is downloaded.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote as percent
from urllib.parse import unquote, urlsplit

from gantline_runtime.checkpoint.files import MAX_FILES, FileSource, LocalFiles, load_json, quote
from gantline_runtime.errors import CheckpointError, ConfigurationError, SourceError
from gantline_runtime.termination import Reason

__all__ = ["HubFiles", "HubModel", "ModelUri", "RedactSecrets", "RemoteFile", "hub_errors", "open_source", "parse_uri"]

DEFAULT_ENDPOINT = "https://huggingface.co"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w./-]{0,254}", re.ASCII)
_MAX_LISTING_BYTES = 64 << 20
_TRIES = 4
_MAX_WAIT_S = 30.0
_RETRIED = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class ModelUri:
    """A parsed model URI: either `path` or `repository` is set."""

    text: str
    path: Path | None = None
    repository: str = ""


def parse_uri(text: str) -> ModelUri:
    """Raises ConfigurationError for a URI that names neither a folder nor a hub's repository."""
    if "://" not in text:
        return ModelUri(text, path=Path(text))
    parts = urlsplit(text)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return ModelUri(text, path=Path(unquote(parts.path)))
    if parts.scheme == "hf":
        repository = text.removeprefix("hf://").rstrip("/")
        if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
            raise ConfigurationError(f"{quote(text)} names no repository", cure="Give hf://organisation/name.")
        return ModelUri(text, repository=repository)
    if parts.scheme == "pvc":
        raise ConfigurationError(f"{quote(text)} is a claim of a cluster", cure="Give the path where the claim is mounted.")
    raise ConfigurationError(f"{quote(text)} is no model source", cure="Give a path, file:///path or hf://organisation/name.")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository. `sha256` is known for large files (LFS), `blob` (git's sha1) for the others."""

    name: str
    size: int
    sha256: str = ""
    blob: str = ""


@dataclass(frozen=True)
class HubModel:
    """A repository at one commit."""

    repository: str
    endpoint: str
    commit: str
    files: Mapping[str, RemoteFile]


def open_source(uri: ModelUri, revision: str = "") -> tuple[FileSource, str, str]:
    """(files, name, commit) of a model source; name and commit are empty for a folder."""
    if uri.path is not None:
        if revision:
            raise ConfigurationError(f"a revision ({quote(revision)}) means nothing for a folder", cure="Leave --revision away.")
        return LocalFiles(uri.path), "", ""
    files = HubFiles(uri.repository, revision)
    return files, uri.repository, files.model.commit


class HubFiles:
    """The files at the top of a hub's repository, read by range requests.

    Raises SourceError: DownloadUnauthorized (401, 403), ModelNotFound (404), DownloadRateLimited (429 to the end),
    DownloadStalled (no answer, or no more bytes, within `timeout_s`).
    """

    def __init__(self, repository: str, revision: str = "", *, timeout_s: float | None = None) -> None:
        import httpx

        self.revision = revision or "main"
        if not _REVISION.fullmatch(self.revision) or ".." in self.revision:
            raise ConfigurationError(f"{quote(revision)} is no revision", cure="Give a branch, a tag or a commit.")
        endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        if urlsplit(endpoint).scheme not in ("http", "https"):
            raise ConfigurationError("HF_ENDPOINT is no http address", cure="Give for instance HF_ENDPOINT=https://huggingface.co.")
        timeout = timeout_s or _positive(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT"), 30.0)
        token = os.environ.get("HF_TOKEN", "").strip()
        headers = {"User-Agent": "gantline", "Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        # httpx drops the token when a redirect leads to another host, as a hub's do to its storage.
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout, connect=10.0), follow_redirects=True, max_redirects=5)
        self._has_token = bool(token)
        self.label = f"hf://{repository}"
        self.model = self._list(repository, endpoint)
        self.sizes: Mapping[str, int] = {file.name: file.size for file in self.model.files.values()}

    def read(self, name: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        path = f"{self.model.repository}/resolve/{percent(self.model.commit, safe='')}/{percent(name)}"
        data = self._get(f"{self.model.endpoint}/{path}", start, length)
        if len(data) != length:
            raise CheckpointError(
                f"{quote(name)} of {self.label} ends {length - len(data)} bytes before byte {start + length}",
                cure="Ask the publisher for a whole file, or give another revision.",
            )
        return data

    def _list(self, repository: str, endpoint: str) -> HubModel:
        url = f"{endpoint}/api/models/{repository}/revision/{percent(self.revision, safe='')}?blobs=true"
        listing = load_json(self._get(url, 0, _MAX_LISTING_BYTES, ranged=False), f"the listing of {self.label}")
        commit, siblings = listing.get("sha"), listing.get("siblings")
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{7,64}", commit) or not isinstance(siblings, list):
            raise SourceError(
                f"the answer of {endpoint} about {repository} is not a hub's", cure="Check HF_ENDPOINT.", reason=Reason.DOWNLOAD_STALLED
            )
        files = [file for file in map(_parse_sibling, siblings[:MAX_FILES]) if file is not None]
        return HubModel(repository, endpoint, commit, {file.name: file for file in files})

    def _get(self, url: str, start: int, length: int, *, ranged: bool = True) -> bytes:
        """Up to `length` bytes from `start`; tries again when asked to wait, or when the server has a bad moment."""
        import httpx

        headers = {"Range": f"bytes={start}-{start + length - 1}"} if ranged else {}
        for remaining in range(_TRIES - 1, -1, -1):
            try:
                with self._client.stream("GET", url, headers=headers) as response:
                    if response.status_code in _RETRIED and remaining:
                        time.sleep(_wait_s(response.headers.get("Retry-After"), _TRIES - remaining))
                        continue
                    translate_status(response.status_code, self.label, self.revision, has_token=self._has_token)
                    skip = start if response.status_code == 200 else 0  # a server that ignores Range sends the whole file
                    return _take(response.iter_bytes(1 << 16), skip, length)
            except httpx.TransportError as error:
                if not remaining:
                    raise stalled(self.label, error) from None
                time.sleep(_wait_s(None, _TRIES - remaining))
        raise AssertionError("unreachable")


def _parse_sibling(item: Any) -> RemoteFile | None:
    """A file at the top of the repository; folders' files are not a checkpoint's."""
    if not isinstance(item, dict) or not isinstance(item.get("rfilename"), str) or type(item.get("size")) is not int or item["size"] < 0:
        return None
    name = item["rfilename"]
    if not name or "/" in name or "\\" in name or name.startswith(".") or len(name) > 255:
        return None
    lfs = item.get("lfs")
    sha256 = lfs.get("sha256") or lfs.get("oid") if isinstance(lfs, dict) else ""
    blob = item.get("blobId")
    return RemoteFile(name, item["size"], sha256 if isinstance(sha256, str) else "", blob if isinstance(blob, str) and not sha256 else "")


def _take(pieces: Iterator[bytes], skip: int, length: int) -> bytes:
    taken = bytearray()
    for piece in pieces:
        if skip >= len(piece):
            skip -= len(piece)
            continue
        taken += piece[skip : skip + length - len(taken)]
        skip = 0
        if len(taken) >= length:
            break
    return bytes(taken)


def _wait_s(retry_after: str | None, attempt: int) -> float:
    return min(_positive(retry_after, 0.5 * 2**attempt), _MAX_WAIT_S)


def _positive(text: str | None, default: float) -> float:
    try:
        value = float(text or "")
    except ValueError:
        return default
    return value if 0 <= value < 1e6 else default


def translate_status(status: int, label: str, revision: str, *, has_token: bool) -> None:
    """Raise the SourceError that an HTTP status means; 2xx raises nothing."""
    if status in (200, 206):
        return
    if status in (401, 403):
        token = "the token in HF_TOKEN may not read it" if has_token else "no token was given"
        raise SourceError(
            f"{label} is private, gated or does not exist (HTTP {status}), and {token}",
            reason=Reason.DOWNLOAD_UNAUTHORIZED,
            cure="Give a token that may read it (HF_TOKEN, or the service's secretRef), and accept the model's licence on the hub.",
        )
    if status == 404:
        raise SourceError(
            f"{label} has no revision {quote(revision)}, or lacks a file that it lists", cure="Check the name and the revision."
        )
    if status == 429:
        raise SourceError(
            f"the hub answers too many requests (HTTP 429) for {label}",
            reason=Reason.DOWNLOAD_RATE_LIMITED,
            cure="Wait some minutes; with a token (HF_TOKEN) the limit is higher.",
        )
    raise SourceError(
        f"the hub answers HTTP {status} for {label}", reason=Reason.DOWNLOAD_STALLED, cure="Try again later; check HF_ENDPOINT."
    )


def stalled(label: str, error: Exception) -> SourceError:
    return SourceError(
        f"the download of {label} stalled ({type(error).__name__})",
        reason=Reason.DOWNLOAD_STALLED,
        cure="Check the network, proxies and HF_ENDPOINT; starting again goes on where it stopped.",
    )


class RedactSecrets(logging.Filter):
    """Takes the token, and the query of any address (storage hosts sign them), out of what libraries log."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = re.sub(r"(https?://[^\s?\"']+)\?[^\s\"']*", r"\1", record.getMessage())
        if token := os.environ.get("HF_TOKEN", "").strip():
            text = text.replace(token, "***")
        record.msg, record.args = text, None
        return True


@contextmanager
def hub_errors(label: str, revision: str) -> Iterator[None]:
    """Translate what huggingface_hub raises into SourceError; messages never hold addresses, which may carry signatures."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        for link in chain:
            if isinstance(link, HfHubHTTPError) and link.response is not None:
                translate_status(link.response.status_code, label, revision, has_token=bool(os.environ.get("HF_TOKEN")))
        if any(isinstance(link, (httpx.TransportError, ConnectionError, TimeoutError)) for link in chain):
            raise stalled(label, error) from None
        if "Consistency check failed" in str(error):
            raise stalled(label, error) from None
        raise
