"""Asks replicas for /metrics and gateways for /demand: many at once, each within bounds of time and size. What fails is None."""

from __future__ import annotations

import asyncio
import ipaddress

import aiohttp

__all__ = ["Scraper"]

_TIMEOUT_S = 3.0
_AT_ONCE = 256  # pods that do not answer take the whole time, and must not make the others' samples old
_MOST_BYTES = 4 << 20


class Scraper:
    """One pool of connections. Use it as an async context manager."""

    def __init__(self, *, timeout_s: float = _TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Scraper:
        # No proxy of the environment: these are addresses of the cluster's own pods.
        limits = aiohttp.ClientTimeout(total=self._timeout_s)
        self._session = aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=_AT_ONCE), trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def fetch(self, address: str, port: int, path: str) -> str | None:
        """The body of a 200, up to 4 MiB; None for anything else."""
        assert self._session is not None, "the scraper is not entered"
        try:
            host = ipaddress.ip_address(address)
        except ValueError:
            return None
        url = f"http://{f'[{host}]' if host.version == 6 else host}:{port}{path}"
        async with self._slots:
            try:
                async with self._session.get(url, allow_redirects=False) as response:
                    return await _body(response) if response.status == 200 else None
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
                return None


async def _body(response: aiohttp.ClientResponse) -> str | None:
    parts: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_chunked(1 << 16):
        size += len(chunk)
        if size > _MOST_BYTES:
            return None
        parts.append(chunk)
    return b"".join(parts).decode(errors="replace")
