"""Who may ask what: API keys in front of every endpoint but those that probes and people need before they have one."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gantline_runtime.server.api_error import ApiError
from gantline_runtime.server.api_keys import ApiKeys
from gantline_runtime.server.callers import HEADER, Caller, current_caller, read_caller

__all__ = ["OPEN_PATHS", "Access", "ToldCaller"]

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/docs", "/openapi.json"})
"""Never ask for a key: probes and scrapers have none, and these tell nothing of anyone's requests."""


class Access:
    """Sets `current_caller` for the request's task. Raises ApiError 401."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            caller = self._keys.find(_bearer(Headers(scope=scope)))
            if caller is None:
                raise ApiError(401, "This API key is not known here.", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            _set_caller(scope, caller)
        await self._app(scope, receive, send)


class ToldCaller:
    """Sets `current_caller` to whom a gateway names, where it names one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (caller := read_caller(Headers(scope=scope).get(HEADER, ""))) is not None:
            _set_caller(scope, caller)
        await self._app(scope, receive, send)


def _set_caller(scope: Scope, caller: Caller) -> None:
    if caller.name:
        scope.setdefault("state", {})["api_key"] = caller.name
    current_caller.set(caller)


def _bearer(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        message = "An API key is missing. Send it as the header Authorization: Bearer KEY."
        raise ApiError(401, message, code="missing_api_key", headers={"WWW-Authenticate": "Bearer"})
    return key.strip()
