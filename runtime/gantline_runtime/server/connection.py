"""uvicorn's connection, with an end to those that never finish a request or stop to read their answer (`stalling.py`), and our shape of
error for what is no HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gantline_runtime.server.api_error import ApiError, raw_answer
from gantline_runtime.server.stalling import CutsStalled

__all__ = ["HEAD_TIMEOUT_S", "MAX_HEAD_BYTES", "Connection", "connection_class"]

HEAD_TIMEOUT_S = 30.0
"""From the connection, or the head's first byte, to the head's end; also for what of a body comes after its answer. Bodies that are read
have a limit of their own (`body.py`)."""
MAX_HEAD_BYTES = 64 * 1024
"""Of the request line and the headers together."""


_LINE_ENDS = b"\r\n"
"""Some clients send one behind a body; before a request they mean nothing (RFC 9112, 2.2), while h11 takes them for one without a line."""


class Connection(CutsStalled, H11Protocol):
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_end()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            data = data.lstrip(_LINE_ENDS)
            if not data:
                return
        super().data_received(data)
        if not self._is_unfinished():
            self._stop_waiting()
            if self._is_answered() and self.timeout_keep_alive_task is None:  # uvicorn ends it with any byte, and may begin none
                self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        elif self._head_timer is None:
            self._expect_end()
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < MAX_HEAD_BYTES:
            self.flow.resume_reading()  # uvicorn stops at what follows a request, and would not see its client leave

    def on_response_complete(self) -> None:
        if self.conn.their_state is h11.DONE:
            self._skip_line_ends()
        super().on_response_complete()
        if self._is_unfinished() and self._head_timer is None:
            self._expect_end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Called where h11 finds no HTTP/1 in what came, or more of a head than it may hold."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer is on its way, and must not seem whole
            message = f"This is no HTTP/1.1 request, or its head has more than {MAX_HEAD_BYTES} bytes."
            self.transport.write(raw_answer(ApiError(400, message, code="invalid_http")))
        self.transport.close()

    def _skip_line_ends(self) -> None:
        """Of what has come behind the request."""
        waiting = self.conn.trailing_data[0]
        count = len(waiting) - len(waiting.lstrip(_LINE_ENDS))
        if count:
            self.conn._receive_buffer.maybe_extract_at_most(count)

    def _is_answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    def _is_unfinished(self) -> bool:
        """Whether a head has begun, or a body goes on whose request is answered already."""
        if self.conn.their_state is h11.SEND_BODY:
            return self._is_answered()
        return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

    def _expect_end(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def connection_class(stall_timeout_s: float) -> type[Connection]:
    """`Connection` with this bound; uvicorn makes its connections of a class."""
    return type("Connection", (Connection,), {"stall_timeout_s": stall_timeout_s})
