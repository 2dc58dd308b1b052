"""The catalog as it is now, and whoever waits for it to change. The one place that discovery writes and requests read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gantline_gateway.catalog import Catalog

__all__ = ["Directory"]


class Directory:
    """`catalog` is empty and `known` False until something was discovered; afterwards the last known catalog stays."""

    def __init__(self) -> None:
        self.catalog = Catalog()
        self.known = False
        self._waiters: dict[int, asyncio.Future[None]] = {}
        self._listeners: list[Callable[[Catalog], None]] = []

    def listen(self, listener: Callable[[Catalog], None]) -> None:
        self._listeners.append(listener)

    def publish(self, catalog: Catalog) -> None:
        """Wakes all who wait, in the order of their numbers: who came first, asks first."""
        changed, self.catalog, self.known = catalog != self.catalog, catalog, True
        if not changed:
            return
        for listener in self._listeners:
            listener(catalog)
        waiters, self._waiters = self._waiters, {}
        for number in sorted(waiters):
            if not waiters[number].done():
                waiters[number].set_result(None)

    async def wait_change(self, number: int, timeout_s: float) -> None:
        """Until the next change, or for `timeout_s`."""
        waiter = self._waiters[number] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait((waiter,), timeout=timeout_s)
        finally:
            if self._waiters.get(number) is waiter:
                del self._waiters[number]
