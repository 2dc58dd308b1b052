"""The HTTP side of one process: its port, with or without TLS, who may use it, and the files behind both, which may change."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from gantline_runtime.config import ServerConfig
from gantline_runtime.server.api_keys import ApiKeys
from gantline_runtime.server.app import create_app
from gantline_runtime.server.connection import MAX_HEAD_BYTES, connection_class
from gantline_runtime.server.listening import FLUSH_S, KEEP_ALIVE_S, HttpServer, allow_many_connections, bind_socket, url_of
from gantline_runtime.server.reloading import Reloader
from gantline_runtime.server.service import Service
from gantline_runtime.server.tls import Certificate
from gantline_runtime.server.tracing import Tracing

__all__ = ["Front"]


class Front:
    """Listens from the start; `serving` answers."""

    def __init__(self, service: Service, config: ServerConfig, *, version: str) -> None:
        """Raises ConfigurationError if the port cannot be had, or keys or certificate cannot be used."""
        allow_many_connections()
        self._reloader = Reloader()
        keys = ApiKeys(Path(config.api_keys)) if config.api_keys is not None else None
        if keys is not None:
            self._reloader.watch([keys.path], keys.reload)
        self._uses_tls = config.tls_cert is not None
        self.socket = bind_socket(config.host, config.port, shared=config.api_workers > 1)
        self._tracing = Tracing(config.otlp_endpoint, version=version) if config.otlp_endpoint is not None else None
        app = create_app(
            service,
            version,
            keys=keys,
            trust_gateway=config.trust_gateway,
            cors_origins=config.cors_origin_list,
            tracing=self._tracing,
        )
        self._http = HttpServer(_uvicorn_config(app, config))
        if config.tls_cert is not None and config.tls_key is not None:
            certificate = Certificate(Path(config.tls_cert), Path(config.tls_key))
            self._reloader.watch(certificate.paths, certificate.reload)
            self._http.config.load()
            self._http.config.ssl = certificate.context

    @property
    def url(self) -> str:
        return url_of(self.socket, uses_tls=self._uses_tls)

    def cut_off(self) -> None:
        """Every request has got its end: clients have `FLUSH_S` to take it, then their connections are cut."""
        self._http.abort_soon()

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


def _uvicorn_config(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=connection_class(config.stall_timeout),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_graceful_shutdown=int(FLUSH_S) + 1,  # when connections have been cut already
    )
