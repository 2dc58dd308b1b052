"""Whole files from a hub, by huggingface_hub, in a way that outlives the process.

`hf_hub_download` throws a half-made file away when its process dies; its `http_get`, which does the work (ranges, retries, size check),
does not. So the partial file is ours, `.download/<name>.<etag>`, and the next process hands it to `http_get` to go on with.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from gantline_runtime.sources.hub import HubModel, hub_errors
from gantline_runtime.sources.remote import DOWNLOADS, RemoteFile
from gantline_runtime.sources.transfer import Downloaded

__all__ = ["download_file"]

_PIECE_BYTES = 1 << 20
"""What is written at once, hence what a killed process loses and how often progress is told; huggingface_hub's own 10 MiB are seconds of a
slow line."""


def _bar_class(downloaded: Downloaded) -> type[tqdm[Any]]:
    """A bar that draws nothing and tells `downloaded` what huggingface_hub tells it."""

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            downloaded.found(int(kwargs.get("initial", 0) or 0))
            kwargs = {key: value for key, value in kwargs.items() if key not in ("name", "log_level")}
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            downloaded.add(int(n or 0))
            return None

    return Bar


def download_file(model: HubModel, file: RemoteFile, folder: Path, downloaded: Downloaded) -> None:
    """Bring `file` into `folder`, going on with what an earlier process left. Raises SourceError."""
    target = folder / file.name
    if target.exists() and target.stat().st_size == file.size:
        downloaded.found(file.size)
        return
    with hub_errors(f"hf://{model.repository}", model.commit):
        _download(model, file, target, downloaded)


def _download(model: HubModel, file: RemoteFile, target: Path, downloaded: Downloaded) -> None:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    token: str | bool = os.environ.get("HF_TOKEN", "").strip() or False
    url = hf_hub_url(model.repository, file.name, revision=model.commit, endpoint=model.endpoint)
    metadata = get_hf_file_metadata(url, token=token, endpoint=model.endpoint, retry_on_errors=True)
    # The address may be a storage host's: it has its own signature, and the token is none of its business.
    same_host = urlsplit(metadata.location).netloc == urlsplit(model.endpoint).netloc
    headers = build_hf_headers(token=token if same_host else False)
    partial = target.parent / DOWNLOADS / f"{file.name}.{re.sub(r'[^A-Za-z0-9]', '', metadata.etag or 'none')[:64]}"
    partial.parent.mkdir(exist_ok=True)
    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, _PIECE_BYTES)
    with partial.open("ab") as stream:
        if stream.tell() > file.size:
            stream.truncate(0)
        start = stream.tell()
        http_get(metadata.location, stream, resume_size=start, headers=headers, expected_size=file.size, tqdm_class=_bar_class(downloaded))
    partial.rename(target)
