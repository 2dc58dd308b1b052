"""A hub that speaks Hugging Face's HTTP: $HF_ENDPOINT (default https://huggingface.co), with $HF_TOKEN if it is set.

`HubFiles` reads pieces of files by range requests, so that a checkpoint is judged by its headers before anything is downloaded; whole files
are huggingface_hub's matter (`hub_download.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote as percent
from urllib.parse import urlsplit

from gantline_runtime.checkpoint.files import MAX_FILES, load_json, quote
from gantline_runtime.errors import CheckpointError, ConfigurationError, SourceError
from gantline_runtime.sources.patience import Interrupted, Refused, Service, persist
from gantline_runtime.sources.remote import RemoteFile, Room, is_file_name
from gantline_runtime.sources.transfer import Downloaded
from gantline_runtime.sources.web import open_client, open_stream, take
from gantline_runtime.termination import Reason

__all__ = ["HubFiles", "HubModel", "hub_errors"]

DEFAULT_ENDPOINT = "https://huggingface.co"
_REVISION = re.compile(r"[A-Za-z0-9_][\w./-]{0,254}", re.ASCII)
_MAX_LISTING_BYTES = 64 << 20


@dataclass(frozen=True)
class HubModel:
    """A repository at one commit."""

    repository: str
    endpoint: str
    commit: str
    files: Mapping[str, RemoteFile]


class HubFiles:
    """The files at the top of a hub's repository.

    Raises SourceError: DownloadUnauthorized (401, 403), ModelNotFound (404), DownloadRateLimited (429 to the end),
    DownloadStalled (no answer, or no more bytes, within `timeout_s`).
    """

    def __init__(self, repository: str, revision: str = "", *, timeout_s: float | None = None) -> None:
        asked = revision or "main"
        if not _REVISION.fullmatch(asked) or ".." in asked:
            raise ConfigurationError(f"{quote(revision)} is no revision", cure="Give a branch, a tag or a commit.")
        endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        if urlsplit(endpoint).scheme not in ("http", "https"):
            raise ConfigurationError("HF_ENDPOINT is no http address", cure="Give for instance HF_ENDPOINT=https://huggingface.co.")
        token = os.environ.get("HF_TOKEN", "").strip()
        self.label = f"hf://{repository}"
        self.service = hub_service(self.label, asked)
        self._client = open_client(timeout_s, {"Authorization": f"Bearer {token}"} if token else {})
        self.model = self._list(repository, asked, endpoint)
        self.name, self.revision, self.files = repository, self.model.commit, self.model.files
        self.sizes: Mapping[str, int] = {file.name: file.size for file in self.files.values()}
        self.inputs = {"endpoint": endpoint, "repository": repository, "revision": self.model.commit}

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

    def room(self, wanted: Sequence[RemoteFile]) -> Room:
        total = sum(file.size for file in wanted)
        return Room(total, total)

    def download(self, wanted: Sequence[RemoteFile], folder: Path, downloaded: Downloaded) -> Sequence[RemoteFile]:
        from gantline_runtime.sources.hub_download import download_file

        for file in wanted:
            download_file(self.model, file, folder, downloaded)
        return wanted

    def _list(self, repository: str, revision: str, endpoint: str) -> HubModel:
        url = f"{endpoint}/api/models/{repository}/revision/{percent(revision, safe='')}?blobs=true"
        listing = load_json(self._get(url, 0, _MAX_LISTING_BYTES, ranged=False), f"the listing of {self.label}")
        commit, siblings = listing.get("sha"), listing.get("siblings")
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{7,64}", commit) or not isinstance(siblings, list):
            raise SourceError(
                f"the answer of {endpoint} about {repository} is not a hub's", cure="Check HF_ENDPOINT.", reason=Reason.DOWNLOAD_STALLED
            )
        files = [file for file in map(_parse_sibling, siblings[:MAX_FILES]) if file is not None]
        return HubModel(repository, endpoint, commit, {file.name: file for file in files})

    def _get(self, url: str, start: int, length: int, *, ranged: bool = True) -> bytes:
        """Up to `length` bytes from `start`."""
        headers = {"Range": f"bytes={start}-{start + length - 1}"} if ranged else {}

        def attempt() -> bytes:
            with open_stream(self._client, url, headers) as response:
                return take(response, start if ranged else 0, length)

        return persist(self.service, attempt)


def hub_service(label: str, revision: str) -> Service:
    """How errors speak of the hub, and of what was asked of it."""
    has_token = bool(os.environ.get("HF_TOKEN", "").strip())
    return Service(
        label, "the hub", "the token in HF_TOKEN may not read it" if has_token else "no token was given",
        "Give a token that may read it (HF_TOKEN, or the service's secretRef), and accept the model's licence on the hub.",
        f"has no revision {quote(revision)}, or lacks a file that it lists",
        "Check the network, proxies and HF_ENDPOINT.",
    )  # fmt: skip


def _parse_sibling(item: Any) -> RemoteFile | None:
    """A file at the top of the repository; folders' files are not a checkpoint's."""
    if not isinstance(item, dict) or not isinstance(item.get("rfilename"), str) or type(item.get("size")) is not int or item["size"] < 0:
        return None
    if not is_file_name(item["rfilename"]):
        return None
    lfs = item.get("lfs")
    sha256 = lfs.get("sha256") or lfs.get("oid") if isinstance(lfs, dict) else ""
    blob = item.get("blobId")
    sha256 = sha256 if isinstance(sha256, str) else ""
    return RemoteFile(item["rfilename"], item["size"], sha256, blob if isinstance(blob, str) and not sha256 else "")


@contextmanager
def hub_errors(label: str, revision: str) -> Iterator[None]:
    """Translate what huggingface_hub raises into SourceError; messages never hold addresses, which may carry signatures."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:
        service = hub_service(label, revision)
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        for link in chain:
            if isinstance(link, HfHubHTTPError) and link.response is not None:
                raise Refused(link.response.status_code, link.response.headers.get("Retry-After")).error(service) from None
        if any(isinstance(link, (httpx.TransportError, ConnectionError, TimeoutError)) for link in chain):
            raise Interrupted(error).error(service) from None
        if "Consistency check failed" in str(error):
            raise Interrupted(error).error(service) from None
        raise
