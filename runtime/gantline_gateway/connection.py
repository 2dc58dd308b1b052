"""uvicorn's fast connection, with bounds to a request's head, to what of a body comes after its answer, and to clients that stop to read:
neither slow nor endless ones hold memory and a file of the process."""

from __future__ import annotations

import asyncio
from typing import Any

from gantline_runtime.server.api_error import ApiError, raw_answer
from gantline_runtime.server.stalling import CutsStalled
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

__all__ = ["MAX_HEAD_BYTES", "Connection", "connection_class"]

MAX_HEAD_BYTES = 64 * 1024
"""A head that has not ended after so many bytes, give or take one read from the socket, is given up."""

_MOST_WAITING = 8
"""Requests that one connection may have waiting behind the one that is answered, before no more are read."""


class _Unframed(RequestResponseCycle):
    """An answer of unknown length to a client that knows no chunks: it ends with the connection. uvicorn frames it all the same."""

    _counted = True

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._counted = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            self.chunked_encoding = None if self._counted else False
        elif not self._counted:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


class Connection(CutsStalled, HttpToolsProtocol):  # type: ignore[misc]  # what the other base knows of is alike
    head_timeout_s = 30.0
    """From the connection, or the head's first byte, to the head's end; also for what of a body comes after its answer. Bodies that are
    read have a limit of their own."""
    _head_timer: asyncio.TimerHandle | None = None
    _rest_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_body = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._answering: Any = None
        """uvicorn's cycle of the request that is answered, while others wait behind it; it knows of the last that came alone."""
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self._head_bytes > MAX_HEAD_BYTES:
            self._end_head()
            self.send_400_response("")
            return
        if self._head_timer is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if 0 < len(self.pipeline) <= _MOST_WAITING and len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()  # uvicorn stops at what follows a request, and would not see its client leave
        if self._head_timer is None and self._is_answered() and self.timeout_keep_alive_task is None:
            # uvicorn ends it with any byte, and may begin none
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        self._in_body = True
        if not self.pipeline:
            self._answering = self.cycle
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _Unframed  # type: ignore[assignment]  # it has not begun: uvicorn makes it and its task in one go

    def on_message_complete(self) -> None:
        self._in_body = False
        self._end_rest()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._answering = self.pipeline[-1][0]
        super().on_response_complete()
        if self._in_body and self._is_answered() and self._rest_timer is None:
            self._rest_timer = self.loop.call_later(self.head_timeout_s, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_rest()
        super().connection_lost(exc)
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def send_400_response(self, msg: str) -> None:
        """Called where httptools finds no HTTP/1 in what came, too."""
        message = f"This is no HTTP/1.1 request, or its head has more than {MAX_HEAD_BYTES} bytes."
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:  # else one must not seem whole
            self.transport.write(raw_answer(ApiError(400, message, code="invalid_http")))
        self.transport.close()

    def _is_answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.abort)

    def _end_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_rest(self) -> None:
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None


def connection_class(*, head_timeout_s: float, stall_timeout_s: float) -> type[Connection]:
    """`Connection` with these bounds; uvicorn makes its connections of a class."""
    return type("Connection", (Connection,), {"head_timeout_s": head_timeout_s, "stall_timeout_s": stall_timeout_s})
