"""The gateway's public port: which endpoints there are, and what happens around every request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gantline_runtime import logs
from gantline_runtime.server.api_error import ApiError, json_response, respond
from gantline_runtime.server.body import BodyLimits, check_content_type, read_body
from gantline_runtime.server.callers import HEADER as CALLER
from gantline_runtime.server.events import ClientLeft
from gantline_runtime.server.request_ids import read_request_id
from gantline_runtime.server.usage_reports import HEADER
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gantline_gateway.answer import Answer, CutOff
from gantline_gateway.bodies import Bodies, BodyShare
from gantline_gateway.catalog import Service, everyone
from gantline_gateway.directory import Directory
from gantline_gateway.errors import not_found, not_known_yet, shutting_down, takes_no_more
from gantline_gateway.exchange import Exchange, ExchangeMiddleware, Handler
from gantline_gateway.models import list_models, show_model
from gantline_gateway.proxy import Proxy
from gantline_gateway.question import parse_question, rename_model
from gantline_gateway.running import Running
from gantline_gateway.traffic import Traffic

__all__ = ["FORWARDED", "Gateway", "Visible", "build_app"]

FORWARDED = frozenset(
    {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize", "/generate", "/v1/encode",
        "/get_ppl",
    }
)  # fmt: skip
"""Endpoints of the runtime whose body names a model: all that it has with POST."""

_MODELS = "/v1/models"
_CLIENT_CLOSED = 499
_MAX_SESSION_BYTES = 256
_NOT_PASSED_ON = frozenset(
    {
        "host", "content-length", "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
        "transfer-encoding", "upgrade", "expect", "origin", "x-request-id", HEADER, CALLER,
    }
)  # fmt: skip
"""Of the connection to the client, or set anew; whose pages may ask is decided here."""

Visible = Callable[[Scope, Service], bool]
"""Whether who sent a request may know and use a service."""

log = logging.getLogger("gantline.access")


def _visible_to_all(scope: Scope, service: Service) -> bool:
    return everyone(service)


@dataclass
class Gateway:
    """What the requests of one process share. `middleware` goes around each exchange, the first outermost."""

    directory: Directory
    traffic: Traffic
    proxy: Proxy
    bodies: Bodies
    body_limits: BodyLimits = BodyLimits(8 << 20, timeout_s=60.0, silence_s=30.0)
    middleware: Sequence[ExchangeMiddleware] = ()
    visible: Visible = _visible_to_all
    takes_requests: bool = True
    """False once a drain has told everybody to go elsewhere."""
    draining: bool = False
    """Clients are then told to close their connections, so that they open the next one to another gateway."""
    running: Running = field(default_factory=Running)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request. Raises ApiError for what has not been answered."""
        path, method = scope["path"], scope["method"]
        if path in FORWARDED:
            _check_method(method, "POST")
            await self._exchange(scope, receive, send)
        elif path == _MODELS or path.startswith(_MODELS + "/"):
            _check_method(method, "GET", "HEAD")
            await json_response(self._describe_models(scope, path))(scope, receive, send)
        else:
            raise not_found(method, path)

    def _describe_models(self, scope: Scope, path: str) -> dict[str, Any]:
        self._check_state()
        name, catalog = path.removeprefix(_MODELS).removeprefix("/"), self.directory.catalog

        def visible(service: Service) -> bool:
            return self.visible(scope, service)

        return show_model(catalog, name, visible) if name else list_models(catalog, visible)

    def _check_state(self) -> None:
        if not self.takes_requests:
            raise takes_no_more()
        if not self.directory.known:
            raise not_known_yet()

    async def _exchange(self, scope: Scope, receive: Receive, send: Send) -> None:
        began_at = self.traffic.clock()
        self._check_state()
        headers = Headers(scope=scope)
        check_content_type(headers)
        self.bodies.check_room(min(_declared_bytes(headers), self.body_limits.max_bytes))
        share, cut = self.bodies.share(), self.running.begin()
        try:
            body = await read_body(Request(scope, receive), self.body_limits, share.grow)
            exchange = self._begin(scope, headers, body, Answer(scope, receive, send), share, began_at)
            await self._answer(exchange, scope, receive, cut)
        finally:
            self.running.end(cut)
            share.release()

    async def _answer(self, exchange: Exchange, scope: Scope, receive: Receive, cut: asyncio.Future[None]) -> None:
        traffic = self.traffic.of(exchange.service.key)
        traffic.last_request_at = self.traffic.clock()
        scope.setdefault("state", {})["exchange"] = exchange
        try:
            await self._run(exchange, receive, cut)
        finally:
            traffic.last_request_at = self.traffic.clock()
            traffic.outcomes[exchange.outcome or "failed"] += 1
            traffic.count_usage(exchange.usage, exchange.question.choices)
            if exchange.held_s:
                traffic.held_s.observe(exchange.held_s)

    def _begin(self, scope: Scope, headers: Headers, body: bytes, answer: Answer, share: BodyShare, began_at: float) -> Exchange:
        question = parse_question(body)
        service = self.directory.catalog.resolve(question.model, lambda service: self.visible(scope, service))
        if question.model != service.model:
            body = rename_model(body, service.model)
        request_id = scope["state"]["request_id"]
        passed_on = {name: value for name, value in headers.items() if name not in _NOT_PASSED_ON and value.isascii()}
        query = scope["query_string"].decode("latin-1")
        return Exchange(
            request_id=request_id,
            path=scope["path"] + (f"?{query}" if query else ""),
            headers={**passed_on, "x-request-id": request_id, HEADER: "report"},
            body=body,
            question=question,
            service=service,
            answer=answer,
            share=share,
            state=scope["state"],
            began_at=began_at,
            session=(headers.get("x-session-id") or question.cache_key).encode()[:_MAX_SESSION_BYTES],
        )

    async def _run(self, exchange: Exchange, receive: Receive, cut: asyncio.Future[None]) -> None:
        """Until it is answered, the client leaves, or a drain cuts it off."""
        work = asyncio.ensure_future(self._handler()(exchange))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, leaving, cut), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await self._settle(exchange, work)
            elif cut.done():
                await _stop(work)
                exchange.outcome = "cut"
                await exchange.answer.fail(shutting_down())
            else:
                exchange.outcome = "left"
                raise ClientLeft
        finally:
            leaving.cancel()
            await _stop(work)

    async def _settle(self, exchange: Exchange, work: asyncio.Future[None]) -> None:
        try:
            work.result()
        except ApiError as error:
            exchange.outcome = _outcome(error.status)
            await exchange.answer.fail(error)
        else:
            exchange.outcome = _outcome(exchange.answer.status)

    def _handler(self) -> Handler:
        handler: Handler = self.proxy.forward
        for layer in reversed(self.middleware):
            handler = _around(layer, handler)
        return handler


def build_app(gateway: Gateway, middleware: Sequence[Middleware] = (), around: Sequence[Middleware] = ()) -> ASGIApp:
    """`middleware` (Starlette's, the first outermost) sees every request of the port, and may raise ApiError; `around` sees errors as
    they are answered, and may answer itself what then is not logged."""
    return _wrapped(_Observer(_wrapped(gateway.handle, middleware), gateway), around)


def _wrapped(app: ASGIApp, middleware: Sequence[Middleware]) -> ASGIApp:
    for layer in reversed(middleware):
        app = layer.cls(app, *layer.args, **layer.kwargs)
    return app


def _around(layer: ExchangeMiddleware, inner: Handler) -> Handler:
    async def handle(exchange: Exchange) -> None:
        await layer(exchange, inner)

    return handle


class _Observer:
    """Around every request: its id, errors that nobody has answered, and a log line without content."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = read_request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        status, began = 0, asyncio.get_running_loop().time()

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                closing = [(b"connection", b"close")] if self._gateway.draining else []
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode()), *closing]
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        except ClientLeft:
            status = status or _CLIENT_CLOSED
        except CutOff as error:
            log.warning("an answer was cut off", extra=logs.fields(request_id=request_id, cause=str(error)))
            raise
        except Exception as error:
            if status:
                raise  # too late for another answer: the connection is cut, so that nobody takes a part for the whole
            known = _known(error, request_id)
            if "exchange" not in scope["state"]:
                self._gateway.traffic.unserved[known.code or str(known.status)] += 1
            await respond(known)(scope, receive, observed_send)
        finally:
            _record(scope, request_id, status, asyncio.get_running_loop().time() - began)


def _known(error: Exception, request_id: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    log.error("a request failed", exc_info=error, extra=logs.fields(request_id=request_id))
    return ApiError(500, f"The gateway failed; its log says more under request_id {request_id}.", code="internal_error")


def _record(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    extra: dict[str, Any] = {"api_key": scope["state"]["api_key"]} if scope["state"].get("api_key") else {}
    exchange: Exchange | None = scope["state"].get("exchange")
    if exchange is not None:
        extra |= {
            "service": exchange.service.key, "replica": exchange.replica, "outcome": exchange.outcome, "attempts": exchange.attempts,
            "held_seconds": round(exchange.held_s, 3), "prompt_tokens": exchange.usage.prompt,
            "completion_tokens": exchange.usage.completion,
        }  # fmt: skip
    path = scope["path"] if scope["path"] in FORWARDED else _MODELS if scope["path"].startswith(_MODELS) else "other"
    log.info(
        "request",
        extra=logs.fields(request_id=request_id, method=scope["method"][:20], path=path, status=status, seconds=round(seconds, 4), **extra),
    )


def _outcome(status: int) -> str:
    """Of the closed set in docs/gateway.md."""
    if status < 400:
        return "ok"
    if status == 429:
        return "busy"
    return "refused" if status < 500 else "failed"


def _check_method(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise ApiError(405, f"Use {allowed[0]} here.", code="method_not_allowed", headers={"Allow": ", ".join(allowed)})


def _declared_bytes(headers: Headers) -> int:
    declared = headers.get("content-length", "")
    return int(declared[:20]) if declared.isdigit() else 0


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(work: asyncio.Future[None]) -> None:
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
