"""The internal port: probes, /metrics, and /demand, by which the operator's autoscaler learns who waits and who is idle.

    GET /demand -> {"services": {"namespace/name": {"held": 2, "held_since_s": 4.2, "running": 1, "last_request_age_s": 0.0}}}

`held` requests wait for a replica, the first of them for `held_since_s` (0 where none waits); a replica has `running`; the last request
came or ended `last_request_age_s` ago, null where this gateway has seen none since it started. Every service of the catalog is listed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gantline_runtime.server.api_error import json_response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gantline_gateway.directory import Directory
from gantline_gateway.metrics import Metrics
from gantline_gateway.traffic import ServiceTraffic, Traffic

__all__ = ["build_internal_app", "describe_demand"]


def build_internal_app(directory: Directory, traffic: Traffic, metrics: Metrics, *, is_ready: Callable[[], bool]) -> Starlette:
    async def healthz(request: Request) -> Response:
        return json_response({"state": "alive"})

    async def readyz(request: Request) -> Response:
        ready = is_ready()
        return json_response({"state": "ready" if ready else "not ready", "services_known": directory.known}, 200 if ready else 503)

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def show_demand(request: Request) -> Response:
        return json_response(describe_demand(directory, traffic))

    routes = {"/healthz": healthz, "/readyz": readyz, "/metrics": show_metrics, "/demand": show_demand}
    return Starlette(routes=[Route(path, handler) for path, handler in routes.items()])


def describe_demand(directory: Directory, traffic: Traffic) -> dict[str, Any]:
    return {"services": {service.key: _describe(traffic.of(service.key), traffic.clock()) for service in directory.catalog.services}}


def _describe(traffic: ServiceTraffic, now: float) -> dict[str, float | None]:
    busy = bool(traffic.running or traffic.held)
    age_s = 0.0 if busy else None if traffic.last_request_at is None else now - traffic.last_request_at
    return {
        "held": len(traffic.held),
        "held_since_s": round(now - min(traffic.held.values()), 3) if traffic.held else 0.0,
        "running": traffic.running,
        "last_request_age_s": None if age_s is None else round(age_s, 3),
    }
