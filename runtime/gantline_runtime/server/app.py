"""The application: the routes, the one error shape, and the access log."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gantline_runtime import logs
from gantline_runtime.server.access import Access, ToldCaller
from gantline_runtime.server.api_keys import ApiKeys
from gantline_runtime.server.cors import cross_origin
from gantline_runtime.server.errors import ApiError, not_found, respond, translate
from gantline_runtime.server.request_ids import read_request_id
from gantline_runtime.server.routes import ROUTES
from gantline_runtime.server.service import Service
from gantline_runtime.server.sse import ClientLeft
from gantline_runtime.server.tracing import FinishedRequest, Tracing
from gantline_runtime.server.usage_reports import UsageReports

__all__ = ["create_app"]

_PROBES = frozenset({"/health", "/ready", "/metrics", "/internal/prefixes"})
"""Asked every few seconds for months; logged only when they fail, or at level debug."""

_CLIENT_CLOSED = 499
"""nginx's status for a client that left; nobody receives it, but the log and the metrics tell."""

log = logging.getLogger("gantline.access")


def create_app(
    service: Service,
    version: str,
    *,
    keys: ApiKeys | None = None,
    trust_gateway: bool = False,
    cors_origins: Sequence[str] = (),
    tracing: Tracing | None = None,
) -> Starlette:
    """`keys` None: anyone may ask. `trust_gateway`: who asks is whom a gateway names. `cors_origins`: whose web pages may, `*` for all.
    `tracing` None: no traces."""
    middleware = [*cross_origin(cors_origins), Middleware(_Observer, service=service, tracing=tracing)]
    if keys is not None:
        middleware.append(Middleware(Access, keys=keys))
    if trust_gateway:
        middleware.append(Middleware(ToldCaller))
    middleware.append(Middleware(UsageReports))
    app = Starlette(
        routes=[Route(route.path, route.handler, methods=[route.method]) for route in ROUTES],
        middleware=middleware,
        exception_handlers={HTTPException: _handle_http_exception},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    app.state.version = version
    app.state.routes = ROUTES
    return app


async def _handle_http_exception(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 404:
        return respond(not_found(request))
    known = translate(error)
    assert known is not None
    return respond(known)


class _Observer:
    """Around every request: its id, the translation of errors, a log line without content, and the count by route and status."""

    def __init__(self, app: ASGIApp, service: Service, tracing: Tracing | None) -> None:
        self._app = app
        self._tracing = tracing
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not scope["path"].startswith("/"):
            scope["path"] = (
                "/" + scope["path"].partition("://")[2].partition("/")[2]
            )  # as clients of a proxy ask, with the whole address (RFC 9112, 3.2.2)
        request = Request(scope)
        began = time.monotonic()
        request_id = read_request_id(request.headers)
        status = 0

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        except ClientLeft:
            status = _CLIENT_CLOSED
        except Exception as error:
            known = translate(error)
            if known is None:
                log.exception("a request failed", extra=logs.fields(request_id=request_id))
                known = ApiError(500, f"The server failed; its log says more under request_id {request_id}.", code="internal_error")
            if status:
                raise  # too late for another answer: the connection is cut, so that nobody takes a part for the whole
            await respond(known)(scope, receive, observed_send)
        finally:
            self._record(request, request_id, status, time.monotonic() - began)

    def _record(self, request: Request, request_id: str, status: int, seconds: float) -> None:
        route = _route(request)
        self._service.metrics.http(route, request.method if request.method in ("GET", "POST") else "other", status)
        quiet = route in _PROBES and status in (200, 503)
        extra: dict[str, Any] = {}
        if hasattr(request.state, "api_key"):
            extra["api_key"] = request.state.api_key
        generation = getattr(request.state, "generation", None)
        usage: dict[str, Any] = {}
        if generation is not None:
            usage = generation.usage()
            extra.update({name: usage[name] for name in ("prompt_tokens", "completion_tokens")})
            extra["finish_reasons"] = generation.finish_reasons
        if self._tracing is not None and route not in _PROBES:
            model = self._service.model.name if self._service.model is not None else ""
            self._tracing.record(
                FinishedRequest(request.method, route, status, seconds, request_id, request.headers, model, generation, usage)
            )
        log.log(
            logging.DEBUG if quiet else logging.INFO,
            "request",
            extra=logs.fields(request_id=request_id, method=request.method, path=route, status=status, seconds=round(seconds, 4), **extra),
        )


def _route(request: Request) -> str:
    """The route's pattern, or `other`: paths that clients make up must not become labels."""
    path = request.scope["path"]
    if any(path == known.path for known in ROUTES):
        return str(path)
    return "/v1/models/{model}" if path.startswith("/v1/models/") else "other"
