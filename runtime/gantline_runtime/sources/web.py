"""HTTP as all sources speak it: a client with bounds, and answers of which no more is read than was asked for."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from gantline_runtime.sources.patience import Interrupted, Refused

if TYPE_CHECKING:
    import httpx

__all__ = ["open_client", "open_stream", "refusal_of", "skipped", "take"]

_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 30.0
"""Longest silence of a server, in seconds. $HF_HUB_DOWNLOAD_TIMEOUT, which huggingface_hub reads too, is another number for all sources."""


def _read_timeout_s() -> float:
    try:
        value = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", ""))
    except ValueError:
        return _READ_TIMEOUT_S
    return value if 0 < value < 1e6 else _READ_TIMEOUT_S


def open_client(timeout_s: float | None = None, headers: Mapping[str, str] | None = None, *, follow_redirects: bool = True) -> httpx.Client:
    """httpx drops `Authorization` when a redirect leads to another host, as those of hubs and registries to their storage do."""
    import httpx

    timeout = httpx.Timeout(timeout_s or _read_timeout_s(), connect=_CONNECT_TIMEOUT_S)
    fixed = {"User-Agent": "gantline", "Accept-Encoding": "identity"}
    trusted = _trusted(os.environ.get("SSL_CERT_FILE", ""), os.environ.get("SSL_CERT_DIR", ""))
    return httpx.Client(
        headers={**fixed, **(headers or {})}, timeout=timeout, verify=trusted, follow_redirects=follow_redirects, max_redirects=5
    )


@cache
def _trusted(file: str, folder: str) -> ssl.SSLContext:
    """The authorities that are trusted where the variables name these; reading them takes longer than many an answer."""
    import httpx

    return httpx.create_ssl_context()


def refusal_of(response: httpx.Response) -> Refused:
    return Refused(response.status_code, response.headers.get("Retry-After"))


@contextmanager
def open_stream(
    client: httpx.Client,
    url: str,
    headers: Mapping[str, str],
    *,
    method: str = "GET",
    refusal: Callable[[httpx.Response], Refused] = refusal_of,
) -> Iterator[httpx.Response]:
    """The answer, of which nothing is read yet. Raises what `refusal` makes of one that is no success, and Interrupted also for what its
    reader runs into."""
    import httpx

    try:
        with client.stream(method, url, headers=headers) as response:
            if response.status_code not in (200, 206):
                raise refusal(response)
            yield response
    except (httpx.TransportError, httpx.TooManyRedirects) as error:
        raise Interrupted(error) from None


def skipped(response: httpx.Response, start: int) -> Iterator[bytes]:
    """The answer's bytes from `start` on, whether it is the range that was asked for or, of a server that knows none, everything."""
    skip = start if response.status_code == 200 else 0
    for piece in response.iter_bytes():  # as they come: what waits for a piece of some size to fill is lost when the connection breaks
        if skip >= len(piece):
            skip -= len(piece)
            continue
        yield piece[skip:]
        skip = 0


def take(response: httpx.Response, start: int, length: int) -> bytes:
    """Up to `length` bytes from `start`."""
    taken = bytearray()
    for piece in skipped(response, start):
        taken += piece[: length - len(taken)]
        if len(taken) >= length:
            break
    return bytes(taken)
