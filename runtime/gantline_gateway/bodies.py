"""How many bytes of bodies the process may have at once. Each body is bounded, and so is what one service holds; their sum would not be."""

from __future__ import annotations

from gantline_runtime.server.api_error import ApiError

__all__ = ["Bodies", "BodyShare"]


class Bodies:
    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.taken = 0

    def share(self) -> BodyShare:
        """Of a body of which nothing has come yet: what clients only announce takes no room from others."""
        return BodyShare(self)

    def check_room(self, size: int) -> None:
        """Raises ApiError 503 where there is none for so many bytes more."""
        if self.taken + size > self._max_bytes:
            message = "The gateway has as many bodies of requests in memory as it may. Try again soon."
            raise ApiError(503, message, code="overloaded", headers={"Retry-After": "1", "Connection": "close"})


class BodyShare:
    """What one body takes, until `release`."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies, self._size = bodies, 0

    def grow(self, size: int) -> None:
        """To `size` bytes, which have come. Raises ApiError 503 where there is no room for them."""
        self._bodies.check_room(size - self._size)
        self.resize(size)

    def resize(self, size: int) -> None:
        self._bodies.taken += size - self._size
        self._size = size

    def release(self) -> None:
        """Again is no harm."""
        self.resize(0)
