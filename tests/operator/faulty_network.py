"""What a network and a loaded API server do to an operator: a proxy between the two that answers in the server's place, late or not at all.

It ends TLS with the cluster's own serving certificate, so that it can answer single requests itself, and has an event loop in a thread of
its own. Faults are told by a list of `Fault`s; each request meets the first that wants it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp
from aiohttp import web
from gantline_devcluster.api_only import ApiCluster, free_port

__all__ = ["Fault", "FaultyNetwork", "is_listing", "is_watch", "is_write"]

_NOT_FORWARDED = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding"}
_MAX_BODY = 16 << 20


@dataclass
class Fault:
    """Of requests that `where` picks, the next `times`: `refused`, the connection is cut; `status` is answered in the server's place;
    `late`, the request is passed on after `delay_s`; `lost`, it is passed on and the connection cut instead of the answer; `expired`, a
    watch is told that its version is too old, as an API server says it: within the stream; `truncated`, a good answer breaks off."""

    kind: Literal["refused", "status", "late", "lost", "expired", "truncated"]
    where: Callable[[web.BaseRequest], bool]
    status: int = 503
    retry_after: str = ""
    delay_s: float = 0.0
    times: int = 1 << 30
    met: int = field(default=0, init=False)


class FaultyNetwork:
    """Use `kubeconfig` to reach the cluster through it."""

    def __init__(self, cluster: ApiCluster) -> None:
        plane = cluster.plane
        self._upstream = cluster.url
        self._keys = cluster.folder / "keys"
        self._port = free_port()
        path = cluster.folder / f"faulty-{self._port}.kubeconfig"
        self.kubeconfig: Path = plane.write_kubeconfig(path, plane.tokens["admin"], "admin", url=f"https://127.0.0.1:{self._port}")
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        """(method, path with query) of each request that came, in order."""
        self._open: dict[int, web.BaseRequest] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-network", daemon=True)

    def __enter__(self) -> FaultyNetwork:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @contextlib.contextmanager
    def fault(self, *faults: Fault) -> Iterator[None]:
        """These faults, for the time of the block."""
        self.faults += faults
        try:
            yield
        finally:
            for fault in faults:
                self.faults.remove(fault)

    @contextlib.contextmanager
    def black_hole(self) -> Iterator[None]:
        """Nothing comes through in either direction, and no connection is closed: as behind a firewall that forgot its flows."""
        self._call(self._swallow(True))
        try:
            yield
        finally:
            self.cut()  # what was swallowed is gone for good; whoever still waits for it would learn so from the next packet
            self._call(self._swallow(False))

    def cut(self) -> None:
        """Every open connection ends at once, without a word."""
        self._call(self._cut())

    # ---- on the proxy's loop

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _start(self) -> None:
        self._flows = asyncio.Event()
        self._flows.set()
        trust = ssl.create_default_context(cafile=str(self._keys / "ca.crt"))
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=trust, limit=0), timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
        )
        serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        serving.load_cert_chain(self._keys / "apiserver.crt", self._keys / "apiserver.key")
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None))
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=serving, shutdown_timeout=0.1).start()

    async def _stop(self) -> None:
        self._flows.set()
        await self._cut()
        await self._runner.cleanup()
        await self._session.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _swallow(self, on: bool) -> None:
        (self._flows.clear if on else self._flows.set)()

    async def _cut(self) -> None:
        for request in tuple(self._open.values()):
            if request.transport is not None:
                request.transport.abort()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        self._open[id(request)] = request
        try:
            await self._flows.wait()
            if request.transport is None or request.transport.is_closing():  # swallowed
                return web.Response(status=502)
            fault = self._fault_of(request)
            if fault is None:
                return await self._forward(request)
            if fault.kind == "status":
                return _refusal(fault.status, fault.retry_after)
            if fault.kind == "truncated":
                return web.Response(text='{"kind": "List", "items": [{', content_type="application/json")
            if fault.kind == "expired":
                return web.Response(text=json.dumps({"type": "ERROR", "object": _status(410)}) + "\n", content_type="application/json")
            if fault.kind == "late":
                await asyncio.sleep(fault.delay_s)
                return await self._forward(request)
            return self._hang_up(request) if fault.kind == "refused" else await self._lose(request)
        except (aiohttp.ClientError, ConnectionError):  # one of the two sides has gone: so goes the other
            return self._hang_up(request)
        finally:
            del self._open[id(request)]

    def _fault_of(self, request: web.BaseRequest) -> Fault | None:
        for fault in tuple(self.faults):
            if fault.met < fault.times and fault.where(request):
                fault.met += 1
                return fault
        return None

    async def _forward(self, request: web.BaseRequest) -> web.StreamResponse:
        async with self._ask(request) as answer:
            response = web.StreamResponse(status=answer.status)
            for name in ("Content-Type", "Retry-After"):
                if name in answer.headers:
                    response.headers[name] = answer.headers[name]
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await self._flows.wait()
                await response.write(chunk)
            await response.write_eof()
            return response

    async def _lose(self, request: web.BaseRequest) -> web.StreamResponse:
        async with self._ask(request) as answer:
            await answer.read()
        return self._hang_up(request)

    def _hang_up(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=502)

    @contextlib.asynccontextmanager
    async def _ask(self, request: web.BaseRequest) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _NOT_FORWARDED}
        body = await request.content.read(_MAX_BODY) if request.body_exists else None
        async with self._session.request(request.method, self._upstream + request.path_qs, headers=headers, data=body) as answer:
            yield answer


def _refusal(code: int, retry_after: str) -> web.Response:
    return web.json_response(_status(code), status=code, headers={"Retry-After": retry_after} if retry_after else {})


def _status(code: int) -> dict[str, object]:
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "message": "made up by a test"}


def is_watch(request: web.BaseRequest) -> bool:
    return request.query.get("watch") == "true"


def is_listing(request: web.BaseRequest) -> bool:
    """Lists and watches, by which an operator keeps up; not the reads of single objects."""
    return request.method == "GET" and ("limit" in request.query or is_watch(request))


def is_write(request: web.BaseRequest) -> bool:
    return request.method != "GET"
