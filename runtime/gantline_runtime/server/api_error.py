"""The one shape of every error, {"error": {"message", "type", "param", "code"}}, for whoever answers OpenAI's clients: server and gateway.

`errors.py` has the codes, and what becomes of the engine's errors. Nothing here knows an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response

__all__ = ["ApiError", "json_response", "raw_answer", "respond"]

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error with its HTTP status; `str(error)` is the message."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})
        """Further members of the body, beside `error`."""

    @property
    def type(self) -> str:
        if self.status in _TYPES:
            return _TYPES[self.status]
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {**self.extra, "error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, dict(headers or {}), "application/json")


def respond(error: ApiError) -> Response:
    return json_response(error.body(), error.status, error.headers)


def raw_answer(error: ApiError) -> bytes:
    """The whole answer as it goes over a connection that is closed after it: to what is no request, so that no application sees it."""
    body = msgspec.json.encode(error.body())
    phrase = HTTPStatus(error.status).phrase
    head = f"HTTP/1.1 {error.status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
