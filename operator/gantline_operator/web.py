"""The operator's HTTP port inside the cluster: /metrics for Prometheus, /load/NAMESPACE/NAME for KEDA."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

__all__ = ["build_application", "serving_http"]

Load = Callable[[str], float | None]
"""Load of `namespace/name` in replicas' worth; None where it is not known."""


Elsewhere = Callable[[str], Awaitable[tuple[int, bytes] | None]]
"""Status and body of what another operator answers to a path; None where it does not."""


def build_application(registry: CollectorRegistry, load: Load, elsewhere: Elsewhere | None = None) -> web.Application:
    """`elsewhere`: who is asked for a load that is not known here."""

    async def metrics(request: web.Request) -> web.Response:
        """All, or those that `name[]` names, as Prometheus' own servers answer it."""
        names = request.query.getall("name[]", [])
        body = generate_latest(registry.restricted_registry(names) if names else registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def service_load(request: web.Request) -> web.Response:
        """503 where the load is not known: an autoscaler that gets no number changes nothing, and 0 would be a number."""
        value = load(f"{request.match_info['namespace']}/{request.match_info['name']}")
        if value is None and elsewhere is not None and (answer := await elsewhere(request.path)) is not None:
            return web.Response(status=answer[0], body=answer[1], content_type="application/json")
        if value is None:
            return web.json_response({"error": "the load of this service is not known"}, status=503)
        return web.json_response({"load": round(value, 3)})

    application = web.Application(client_max_size=1 << 10)
    application.router.add_get("/metrics", metrics)
    application.router.add_get("/load/{namespace}/{name}", service_load)
    return application


@asynccontextmanager
async def serving_http(application: web.Application, address: str, port: int, context: ssl.SSLContext | None = None) -> AsyncIterator[None]:
    """Serves within the block; nothing with port 0. Raises OSError where the port is taken.

    Each connection carries one request: kopf waits at its end for connections that wait for another, and so would the next leader.
    """

    async def close(request: web.Request, response: web.StreamResponse) -> None:
        response.force_close()

    application.on_response_prepare.append(close)
    runner = web.AppRunner(application, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        if port:
            await web.TCPSite(runner, address, port, ssl_context=context).start()
        yield
    finally:
        await runner.cleanup()
