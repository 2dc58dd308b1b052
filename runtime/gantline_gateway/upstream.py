"""One request to one replica: over a pooled connection, answered by a head and then by chunks as they come."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from gantline_runtime.server.listening import DEAD_PEERS

from gantline_gateway.catalog import Replica

__all__ = ["Broken", "Unreachable", "Upstream", "UpstreamAnswer"]

_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"}
)
"""Of one connection, not of the request (RFC 9110, 7.6.1)."""
_KEEP_ALIVE_S = 30.0
"""Below the 75 s for which a replica keeps an idle connection: none is used that is just being closed."""
_READ_BYTES = 256 * 1024
"""What is read ahead of a slow client, for each request."""


class Unreachable(Exception):
    """No connection: the replica has not seen the request."""


class Broken(Exception):
    """The connection ended before the answer did: the replica may have seen the request."""


@dataclass(frozen=True)
class UpstreamAnswer:
    """`close` at any time ends the request at the replica too, unless the answer was read to its end."""

    status: int
    headers: list[tuple[bytes, bytes]]
    """Without those of the connection."""
    _response: aiohttp.ClientResponse

    def header(self, name: str) -> str:
        return self._response.headers.get(name, "")

    @property
    def is_stream(self) -> bool:
        return self.header("content-type").startswith("text/event-stream")

    @property
    def length(self) -> int | None:
        return self._response.content_length

    async def read(self) -> bytes:
        """The whole body. Raises Broken."""
        with _translated():
            return await self._response.read()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives. Raises Broken."""
        with _translated():
            async for chunk in self._response.content.iter_any():
                yield chunk

    def close(self) -> None:
        if not self._response.content.is_eof():
            self._response.close()
        self._response.release()


class Upstream:
    """Connections to all replicas."""

    def __init__(self, *, connect_timeout_s: float) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._session: aiohttp.ClientSession | None = None  # made with the first request, on its event loop

    async def send(self, replica: Replica, method: str, path: str, headers: Mapping[str, str], body: bytes) -> UpstreamAnswer:
        """The head of the answer. Raises Unreachable or Broken."""
        with _translated():
            session = self._session or self._open()
            response = await session.request(method, replica.url + path, headers=headers, data=body, allow_redirects=False)
        kept = [(name.lower(), value) for name, value in response.raw_headers if name.decode("latin-1").lower() not in _HOP_BY_HOP]
        return UpstreamAnswer(response.status, kept, response)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S, socket_factory=_make_socket, use_dns_cache=False)
        # Answers take as long as they take: a dead peer is noticed by the kernel, a stuck engine by its own probe.
        limits = aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=limits,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            read_bufsize=_READ_BYTES,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        )
        return self._session


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        raise Unreachable(str(error)) from error
    except (aiohttp.ConnectionTimeoutError, aiohttp.SocketTimeoutError) as error:
        raise Unreachable(str(error)) from error
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from error


def _make_socket(address: tuple[Any, ...]) -> socket.socket:
    """A replica whose node is gone says no goodbye: the kernel asks, and gives up within a minute."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    for option, value in DEAD_PEERS:
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return made
