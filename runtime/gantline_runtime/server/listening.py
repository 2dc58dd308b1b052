"""How a process of ours listens: a socket that notices dead peers, and an HTTP server that leaves signals to its owner."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator

import uvicorn

from gantline_runtime.errors import ConfigurationError

__all__ = ["DEAD_PEERS", "FLUSH_S", "KEEP_ALIVE_S", "HttpServer", "allow_many_connections", "bind_socket", "url_of"]

DEAD_PEERS = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3), (socket.TCP_USER_TIMEOUT, 60_000))
"""A client whose machine or network is gone says no goodbye; within a minute its connection is given up, and its requests with it."""
_MOST_UNSENT_BYTES = 128 * 1024
"""What the kernel takes of one connection's output ahead of what the client's window allows: by itself it takes 4 MB, for a client that
does not read."""
KEEP_ALIVE_S = 75
"""Longer than proxies keep idle connections (60 s for nginx), so that they close first and no request meets a closing connection."""
FLUSH_S = 2.0
"""For last answers and error events to reach their clients."""
_MOST_FILES = 1 << 20
"""More than one process can serve; some systems allow a thousand times as many."""


class HttpServer(uvicorn.Server):
    """uvicorn without its handlers of signals: those are the business of whoever runs it. Its end waits for no client for longer than
    `FLUSH_S`: one that does not read its answer would hold it up until TCP gives the connection up."""

    _abort: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def abort_soon(self) -> None:
        """Cut every connection that is still open `FLUSH_S` after the first call, with what it has not taken."""
        if self._abort is None:
            self._abort = asyncio.get_running_loop().call_later(FLUSH_S, self._abort_connections)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.abort_soon()
        await super().shutdown(sockets)

    def _abort_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def allow_many_connections() -> None:
    """Let this process, and those that it starts, have as many open files as the system allows: each connection is one, and the number
    that a process begins with, 1024 under some container runtimes, is a busy server's within seconds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bind_socket(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A TCP socket bound to `host` (a name or an address, also IPv6). Raises ConfigurationError.

    `shared`: other processes of this user may listen on the port as well, and the kernel spreads connections over them.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for option, value in DEAD_PEERS:
            bound.setsockopt(socket.IPPROTO_TCP, option, value)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MOST_UNSENT_BYTES)
        bound.bind(address)
        # Listen now: who connects while the model loads is queued by the kernel, not refused.
        bound.listen(2048)
    except OSError as error:
        cause = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise ConfigurationError(cause, cure="Give another --port (0 picks a free one) or --host.") from None
    return bound


def url_of(bound: socket.socket, *, uses_tls: bool = False) -> str:
    """An address under which whoever listens on `bound` can be asked from this machine."""
    host, port = bound.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if uses_tls else 'http'}://{shown}:{port}"
