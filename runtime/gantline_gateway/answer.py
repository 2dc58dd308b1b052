"""What a client gets: an answer passed on, a stream that is kept alive until one begins, an error, or an error event in mid-stream.

nothing sent ──start──> answer ──end──> done
     │                    ^  └──fail──> stream: error event, end; else the connection is cut, so that nobody takes a part for the whole
     │                    │
     ├──keep_alive──> stream of comments ──fail──> error event, end
     └──fail──> an error with its status
"""

from __future__ import annotations

from collections.abc import Iterable

from gantline_runtime.server.api_error import ApiError, respond
from gantline_runtime.server.events import encode_event
from starlette.types import Receive, Scope, Send

__all__ = ["Answer", "CutOff"]

Headers = list[tuple[bytes, bytes]]

_EVENT_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"),
]  # fmt: skip
_RESPONSES = "/v1/responses"


class CutOff(Exception):
    """An answer that cannot be completed and is no stream: raised to the HTTP server, which closes the connection."""


class Answer:
    """To one request. `status` is 0 until something was sent."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.status = 0
        self.is_stream = False
        self.kept_alive = False
        """Whether comments were sent, and with them the status 200."""

    async def start(self, status: int, headers: Headers, *, is_stream: bool) -> None:
        """The head of the answer; where comments were sent, there is one already."""
        if self.kept_alive:
            return
        self.status, self.is_stream = status, is_stream
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, chunk: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": chunk, "more_body": more})

    async def keep_alive(self, comment: str) -> None:
        """A comment, which clients of event streams ignore. Only for requests that asked for a stream."""
        await self.start(200, _EVENT_STREAM.copy(), is_stream=True)
        self.kept_alive = True
        await self.write(f": {comment}\n\n".encode())

    async def fail(self, error: ApiError) -> None:
        """End with `error`, in the form that is still possible. Raises CutOff where none is."""
        if not self.status:
            self.status = error.status
            await respond(error)(self._scope, self._receive, self._send)
        elif self.is_stream:
            await self.write(error_event(self._scope["path"], error), more=False)
        else:
            raise CutOff(str(error)) from error


def error_event(path: str, error: ApiError) -> bytes:
    """As the endpoint's clients expect it: OpenAI's responses have typed events, the others the body of an error."""
    if path == _RESPONSES:
        body = {"type": "error", "code": error.code or "server_error", "message": str(error), "param": error.param}
        return encode_event(body, name="error")
    return encode_event(error.body())


def without(headers: Iterable[tuple[bytes, bytes]], names: frozenset[bytes]) -> Headers:
    return [(name, value) for name, value in headers if name not in names]
