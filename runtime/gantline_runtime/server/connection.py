"""uvicorn's connection, with an end to those that never finish a request's head or stop to read their answer, and our shape of error for
what is no HTTP.

A client that does not read has its answer wait: 64 KiB here, and the kernel's share (`listening.py`). Then nothing more is written, and a
client that has not taken a byte for `stall_timeout_s` is cut off, which ends its requests as if it had left.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol

from gantline_runtime import logs
from gantline_runtime.server.api_error import ApiError, raw_answer

__all__ = ["HEAD_TIMEOUT_S", "MAX_HEAD_BYTES", "Connection", "connection_class"]

log = logging.getLogger("gantline.server")

HEAD_TIMEOUT_S = 30.0
"""From the connection, or the head's first byte, to the head's end. Bodies have a limit of their own (`body.py`)."""
MAX_HEAD_BYTES = 64 * 1024
"""Of the request line and the headers together."""


_LOOKS = 4
"""At a client that does not read, within the time that it has."""
_BYTES_ACKED = 120
"""Where Linux's `struct tcp_info` has `tcpi_bytes_acked`, 8 bytes."""


class Connection(H11Protocol):
    stall_timeout_s = 30.0
    """Without a byte taken, while more waits than is written ahead."""
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _taken, _taken_at = 0, 0.0
    """Bytes of output that the client's machine has taken, and when the last of them was seen to be."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=HIGH_WATER_LIMIT)  # uvloop's own is eight times as high with TLS
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        incomplete = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not incomplete:
            self._stop_waiting()
        elif self._head_timer is None:
            self._expect_head()
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < MAX_HEAD_BYTES:
            self.flow.resume_reading()  # uvicorn stops at what follows a request, and would not see its client leave

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_looking()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taken, self._taken_at = self._bytes_taken(), self.loop.time()
        self._look_later()

    def resume_writing(self) -> None:
        self._stop_looking()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Called where h11 finds no HTTP/1 in what came, or more of a head than it may hold."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer is on its way, and must not seem whole
            message = f"This is no HTTP/1.1 request, or its head has more than {MAX_HEAD_BYTES} bytes."
            self.transport.write(raw_answer(ApiError(400, message, code="invalid_http")))
        self.transport.close()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _look(self) -> None:
        taken, now = self._bytes_taken(), self.loop.time()
        if taken != self._taken:
            self._taken, self._taken_at = taken, now
        elif now - self._taken_at >= self.stall_timeout_s:
            log.info("a client does not read its answer", extra=logs.fields(seconds=round(now - self._taken_at, 1)))
            self.transport.abort()
            return
        self._look_later()

    def _look_later(self) -> None:
        self._stop_looking()
        self._stall_timer = self.loop.call_later(self.stall_timeout_s / _LOOKS, self._look)

    def _stop_looking(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _bytes_taken(self) -> int:
        """What waits in our own buffer would not tell: it moves on by whole buffers of the kernel, minutes for a slow reader."""
        info = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
        return int(struct.unpack_from("=Q", info, _BYTES_ACKED)[0])


def connection_class(stall_timeout_s: float) -> type[Connection]:
    """`Connection` with this bound; uvicorn makes its connections of a class."""
    return type("Connection", (Connection,), {"stall_timeout_s": stall_timeout_s})
