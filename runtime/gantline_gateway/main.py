"""`gantline-gateway`: one address for every service.

listen ──> services known ──> ready ──SIGTERM──> not ready, requests still taken ──> none taken, running ones go on ──> error events, exit 0
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import cast

import uvicorn
import uvloop
from gantline_runtime import logs, termination
from gantline_runtime.errors import GantlineError
from gantline_runtime.server.body import BodyLimits
from gantline_runtime.server.cors import cross_origin
from gantline_runtime.server.listening import KEEP_ALIVE_S, HttpServer, allow_many_connections, bind_socket, url_of
from gantline_runtime.server.reloading import Reloader
from gantline_runtime.server.tls import Certificate
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from gantline_gateway.access import Access, KeyCheck
from gantline_gateway.app import Gateway, build_app
from gantline_gateway.bodies import Bodies
from gantline_gateway.cluster_api import ClusterApi, connect
from gantline_gateway.connection import connection_class
from gantline_gateway.demand import build_internal_app
from gantline_gateway.directory import Directory
from gantline_gateway.discovery import Discovery
from gantline_gateway.holding import HoldLimits, WaitingRoom
from gantline_gateway.key_sources import find_keys
from gantline_gateway.metrics import Metrics
from gantline_gateway.own_replicas import OwnReplicas
from gantline_gateway.prefix_polling import PrefixPoller
from gantline_gateway.prefixes import PrefixAffinity, PrefixIndex
from gantline_gateway.proxy import Proxy
from gantline_gateway.settings import GatewaySettings, from_environment
from gantline_gateway.static_services import read_services
from gantline_gateway.traffic import Traffic
from gantline_gateway.upstream import Upstream

__all__ = ["Process", "main"]

_FLUSH_S = 2.0
"""For last answers and error events to reach their clients."""

_RELOAD_S = 0.25
"""Requests may wait for what a changed file says."""

log = logging.getLogger("gantline.gateway")


class Process:
    """One gateway. Make it on the event loop."""

    def __init__(self, settings: GatewaySettings, api: ClusterApi | None) -> None:
        """`api`: whom to ask for services, where no file lists them. Raises ConfigurationError for a port or a file that cannot be used."""
        allow_many_connections()
        self._settings, self._api = settings, api
        self.directory, self.traffic = Directory(), Traffic()
        limits = HoldLimits(settings.hold_silence, settings.hold_timeout, settings.hold_requests, settings.hold_bytes)
        self.upstream = Upstream(connect_timeout_s=settings.connect_timeout)
        waiting, prefixes = WaitingRoom(self.directory, self.traffic, limits), PrefixIndex()
        proxy = Proxy(self.traffic, waiting, self.upstream, PrefixAffinity(prefixes), max_resets=settings.max_resets)
        self._poller = PrefixPoller(self.directory, self.traffic, self.upstream, prefixes)
        self._reloader = Reloader(_RELOAD_S)
        self._keys = find_keys(settings, api, self._reloader)
        self.access = Access(self._keys)
        self.gateway = Gateway(
            self.directory,
            self.traffic,
            proxy,
            Bodies(settings.body_bytes),
            BodyLimits(settings.max_body_bytes, settings.body_timeout, settings.stall_timeout),
            middleware=[self.access.limit],
            visible=self.access.visible,
        )
        self.metrics = Metrics(self.traffic, self.directory, importlib.metadata.version("gantline"))
        self.metrics.register(self.access.counters)
        self.directory.listen(lambda catalog: self.traffic.forget_all_but(service.key for service in catalog.services))
        if settings.services is not None:
            self._offer(settings.services)
        self._tls = _use_tls(settings, self._reloader)
        self._socket = bind_socket(settings.host, settings.port)
        self._internal_socket = bind_socket(settings.host, settings.internal_port)
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Until SIGTERM or SIGINT, and a drain."""
        internal = build_internal_app(self.directory, self.traffic, self.metrics, is_ready=lambda: self._is_ready)
        with self._signals():
            public = build_app(self.gateway, [Middleware(KeyCheck, access=self.access)], cross_origin(self._settings.cors_origins))
            async with self._serving(public, self._socket, self._tls), self._serving(internal, self._internal_socket):
                url = url_of(self._socket, uses_tls=self._tls is not None)
                log.info("listening", extra=logs.fields(url=url, internal_url=url_of(self._internal_socket)))
                finding, polling = asyncio.create_task(self._find_services()), asyncio.create_task(self._poller.run())
                stopping = asyncio.create_task(self._stop.wait())
                try:
                    await asyncio.wait((finding, polling, stopping), return_when=asyncio.FIRST_COMPLETED)
                    for task in (finding, polling):
                        if task.done():
                            task.result()  # it never ends by itself: raises our defect, and another process is started
                    await self._drain()
                finally:
                    finding.cancel()
                    polling.cancel()
                    stopping.cancel()
                    await asyncio.gather(finding, polling, stopping, return_exceptions=True)
                    await self.upstream.close()

    async def _find_services(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._reloader.run())
            if self._keys is not None:
                group.create_task(self._keys.run())
            if self._api is not None:
                group.create_task(Discovery(self._api, self.directory, self._settings.watch_namespaces).run())
                if self._settings.own_service:
                    namespace, _, name = self._settings.own_service.partition("/")
                    group.create_task(OwnReplicas(self._api, namespace, name, self.access.share_with).run())

    @property
    def _is_ready(self) -> bool:
        known = self.directory.known and (self._keys is None or self._keys.known)
        return known and not self._stop.is_set()

    def _offer(self, path: Path) -> None:
        """Raises ConfigurationError."""
        self.directory.publish(read_services(path))
        self._reloader.watch([path], lambda: self.directory.publish(read_services(path)))

    async def _drain(self) -> None:
        settings, running = self._settings, self.gateway.running
        loop = asyncio.get_running_loop()
        began = loop.time()
        self.gateway.draining = True
        log.info("draining", extra=logs.fields(running=len(running.requests)))
        await self._wait(asyncio.Event(), min(settings.drain_delay, settings.drain_timeout))
        self.gateway.takes_requests = False
        await self._wait(running.none, settings.drain_timeout - (loop.time() - began))
        unfinished = running.cut_off()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(running.none.wait(), _FLUSH_S)
        log.info("drained", extra=logs.fields(unfinished=unfinished, seconds=round(loop.time() - began, 1)))

    async def _wait(self, event: asyncio.Event, timeout_s: float) -> None:
        """For `event`, or a second signal."""
        tasks = [asyncio.create_task(event.wait()), asyncio.create_task(self._hurry.wait())]
        await asyncio.wait(tasks, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    @contextlib.asynccontextmanager
    async def _serving(self, app: ASGIApp, bound: socket.socket, tls: Certificate | None = None) -> AsyncIterator[None]:
        config = uvicorn.Config(
            app,
            http=connection_class(head_timeout_s=self._settings.head_timeout, stall_timeout_s=self._settings.stall_timeout),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing here asks whose address it is
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(_FLUSH_S),
        )
        if tls is not None:
            config.load()
            config.ssl = tls.context
        server = HttpServer(config)
        task = asyncio.create_task(server.serve(sockets=[bound]))
        try:
            yield
        finally:
            server.should_exit = True
            await asyncio.gather(task, return_exceptions=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        """The first asks for a drain, a second one for an end to it."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()


def _use_tls(settings: GatewaySettings, reloader: Reloader) -> Certificate | None:
    """Connections that are open keep theirs when another certificate comes. Raises ConfigurationError."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    certificate = Certificate(settings.tls_cert, settings.tls_key)
    reloader.watch(certificate.paths, certificate.reload)
    return certificate


def main(arguments: Sequence[str] | None = None) -> int:
    """The gateway's process; its exit code."""
    try:
        settings = from_environment(os.environ, sys.argv[1:] if arguments is None else arguments)
        logs.configure(settings.log_level, cast(logs.LogFormat, settings.log_format))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(settings))
    except GantlineError as error:
        print(f"gantline-gateway: {error}. {error.cure}", file=sys.stderr)
        termination.write(termination.TerminationMessage(error.reason, str(error), error.cure))
        return termination.exit_code(error.reason)
    return 0


async def _run(settings: GatewaySettings) -> None:
    api = await connect() if settings.services is None else None
    try:
        await Process(settings, api).run()
    finally:
        if api is not None:
            await api.close()


if __name__ == "__main__":
    sys.exit(main())
