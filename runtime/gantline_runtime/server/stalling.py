"""Cuts off clients that do not read their answers: of whichever HTTP protocol of uvicorn's this is mixed into.

A client that does not read has its answer wait: 64 KiB here, and the kernel's share (`listening.py`). Then nothing more is written, and a
client that has not taken a byte for `stall_timeout_s` is cut off, which ends its requests as if it had left.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from gantline_runtime import logs

__all__ = ["CutsStalled"]

log = logging.getLogger("gantline.server")

_LOOKS = 4
"""At a client that does not read, within the time that it has."""
_BYTES_ACKED = 120
"""Where Linux's `struct tcp_info` has `tcpi_bytes_acked`, 8 bytes."""

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as _Protocol
else:
    _Protocol = object


class CutsStalled(_Protocol):
    stall_timeout_s = 30.0
    """Without a byte taken, while more waits than is written ahead."""
    _stall_timer: asyncio.TimerHandle | None = None
    _taken, _taken_at = 0, 0.0
    """Bytes of output that the client's machine has taken, and when the last of them was seen to be."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=HIGH_WATER_LIMIT)  # uvloop's own is eight times as high with TLS

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_looking()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taken, self._taken_at = self._bytes_taken(), self.loop.time()
        self._look_later()

    def resume_writing(self) -> None:
        self._stop_looking()
        super().resume_writing()

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
