"""The HTTP side of one process: its port, with or without TLS, who may use it, and the files behind both, which may change."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from gantline_runtime.config import ServerConfig
from gantline_runtime.errors import ConfigurationError
from gantline_runtime.server.api_keys import ApiKeys
from gantline_runtime.server.app import create_app
from gantline_runtime.server.connection import Connection
from gantline_runtime.server.reloading import Reloader
from gantline_runtime.server.service import Service
from gantline_runtime.server.tls import Certificate
from gantline_runtime.server.tracing import Tracing

__all__ = ["FLUSH_S", "Front", "bind_socket"]

FLUSH_S = 2.0
"""For last answers and error events to reach their clients."""
_DEAD_PEERS = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3), (socket.TCP_USER_TIMEOUT, 60_000))
"""A client whose machine or network is gone says no goodbye; within a minute its connection is given up, and its requests with it."""
_KEEP_ALIVE_S = 75
"""Longer than proxies keep idle connections (60 s for nginx), so that they close first and no request meets a closing connection."""


class Front:
    """Listens from the start; `serving` answers."""

    def __init__(self, service: Service, config: ServerConfig, *, version: str) -> None:
        """Raises ConfigurationError if the port cannot be had, or keys or certificate cannot be used."""
        self._reloader = Reloader()
        keys = ApiKeys(Path(config.api_keys)) if config.api_keys is not None else None
        if keys is not None:
            self._reloader.watch([keys.path], keys.reload)
        self._uses_tls = config.tls_cert is not None
        self.socket = bind_socket(config.host, config.port, shared=config.api_workers > 1)
        self._tracing = Tracing(config.otlp_endpoint, version=version) if config.otlp_endpoint is not None else None
        app = create_app(service, version, keys=keys, cors_origins=config.cors_origin_list, tracing=self._tracing)
        self._http = _HttpServer(_uvicorn_config(app))
        if config.tls_cert is not None and config.tls_key is not None:
            certificate = Certificate(Path(config.tls_cert), Path(config.tls_key))
            self._reloader.watch(certificate.paths, certificate.reload)
            self._http.config.load()
            self._http.config.ssl = certificate.context

    @property
    def url(self) -> str:
        host, port = self.socket.getsockname()[:2]
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"{'https' if self._uses_tls else 'http'}://{shown}:{port}"

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answer requests inside of the block; what is still open at its end gets a moment to be sent."""
        tasks = [asyncio.create_task(self._http.serve(sockets=[self.socket])), asyncio.create_task(self._reloader.run())]
        try:
            yield
        finally:
            tasks[1].cancel()
            self._http.should_exit = True
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._tracing is not None:
                await self._tracing.close()


class _HttpServer(uvicorn.Server):
    """Signals are the runner's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn_config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(FLUSH_S),
    )


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
        for option, value in _DEAD_PEERS:
            bound.setsockopt(socket.IPPROTO_TCP, option, value)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        bound.bind(address)
        # Listen now: who connects while the model loads is queued by the kernel, not refused.
        bound.listen(2048)
    except OSError as error:
        cause = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise ConfigurationError(cause, cure="Give another --port (0 picks a free one) or --host.") from None
    return bound
