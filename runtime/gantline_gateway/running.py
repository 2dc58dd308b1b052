"""The requests under way, so that a drain can wait for the last of them, and end those that take too long."""

from __future__ import annotations

import asyncio

__all__ = ["Running"]


class Running:
    """Make it on the event loop."""

    def __init__(self) -> None:
        self.requests: set[asyncio.Future[None]] = set()
        """One for each request; done means that it has to end now, with an error."""
        self.none = asyncio.Event()
        self.none.set()

    def begin(self) -> asyncio.Future[None]:
        cut: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.requests.add(cut)
        self.none.clear()
        return cut

    def end(self, cut: asyncio.Future[None]) -> None:
        self.requests.discard(cut)
        if not self.requests:
            self.none.set()

    def cut_off(self) -> int:
        """How many had to be."""
        for cut in self.requests:
            if not cut.done():
                cut.set_result(None)
        return len(self.requests)
