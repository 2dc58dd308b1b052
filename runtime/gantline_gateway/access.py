"""Who asks, which services they may use, and how much: before anything else is done for a request.

    401 missing_api_key, invalid_api_key     429 rate_limit_exceeded (Retry-After)

Services that a key may not use are not listed to it, and asking for one is a 403 (`catalog.py`). What is known of the caller is told to the
replica, whose queue is fair between callers.
"""

from __future__ import annotations

from gantline_runtime.server.api_error import ApiError
from gantline_runtime.server.callers import HEADER, Caller
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gantline_gateway.catalog import Service
from gantline_gateway.exchange import Exchange, Handler
from gantline_gateway.key_sources import KeySource
from gantline_gateway.keys import ANYONE, ApiKey
from gantline_gateway.limits import Limiter, OverLimit, Ticket, estimate_tokens
from gantline_gateway.usage import UsageCounters

__all__ = ["Access", "KeyCheck"]

_STATE = "gateway_key"


class Access:
    """`keys` has them as they are now; None where nobody needs one."""

    def __init__(self, keys: KeySource | None) -> None:
        self.counters = UsageCounters()
        self._keys = keys
        self._limiter = Limiter()

    def share_with(self, replicas: int) -> None:
        """Limits hold over so many gateways, of which this is one."""
        self._limiter.replicas = replicas
        self.counters.sharing.set(replicas)

    def identify(self, authorization: str) -> ApiKey:
        """Whose the header `Authorization` is. Raises ApiError 401."""
        if self._keys is None:
            return ANYONE
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            message = "An API key is missing. Send it as the header Authorization: Bearer KEY."
            raise ApiError(401, message, code="missing_api_key", headers={"WWW-Authenticate": "Bearer"})
        found = self._keys.ring.find(key.strip())
        if found is None:
            raise ApiError(401, "This API key is not known here.", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found

    def visible(self, scope: Scope, service: Service) -> bool:
        """Whether who sent the request may know and use `service`."""
        key: ApiKey = scope["state"].get(_STATE, ANYONE)
        return key.may_use(service.namespace, service.name, service.model)

    async def limit(self, exchange: Exchange, handler: Handler) -> None:
        """Around each exchange: within the key's limits, or ApiError 429; then its usage is counted, however it ended."""
        key: ApiKey = exchange.state.get(_STATE, ANYONE)
        ticket = self._admit(key, exchange)
        exchange.headers[HEADER] = _caller(key).to_header()
        try:
            await handler(exchange)
        finally:
            ticket.close(exchange.usage.prompt + exchange.usage.completion)
            self.counters.count(key.name, exchange.usage)

    def _admit(self, key: ApiKey, exchange: Exchange) -> Ticket:
        try:
            return self._limiter.admit(key, estimate_tokens(exchange.question))
        except OverLimit as error:
            self.counters.count_limited(key.name, error.limit)
            headers = {"Retry-After": str(error.retry_after_s)}
            raise ApiError(429, str(error), code="rate_limit_exceeded", headers=headers) from None


def _caller(key: ApiKey) -> Caller:
    return Caller(key.name, key.weight) if key.priority is None else Caller(key.name, key.weight, key.priority)


class KeyCheck:
    """Sets the key for the request, and its name for the log. Raises ApiError 401.

    A key of the gateway's goes no further. Where it has none, what clients send is left to replicas that ask for keys of their own.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            key = self._access.identify(Headers(scope=scope).get("authorization", ""))
            scope["state"] |= {_STATE: key, "api_key": key.name}
            if key is not ANYONE:
                scope["headers"] = [header for header in scope["headers"] if header[0] != b"authorization"]
        await self._app(scope, receive, send)
