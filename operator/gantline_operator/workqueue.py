"""A queue of keys to be reconciled: each key by one worker at a time, however many events named it.

                  add                         get                      done
    (unknown) ---------->  ready  ------------------------->  working ------> (unknown)
        |                    ^  ^                                |
        | add_after, retry   |  |  add while working: again      |
        +----> delayed ------+  +----------- once done ----------+
                  when due

`Schedule` is the bookkeeping: plain, without a clock of its own. `WorkQueue` adds a loop's time and a way to wait. Failures back off
exponentially per key with jitter, so that a thousand services do not come back in one instant when the API server does.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Schedule", "WorkQueue", "backoff_s"]

K = TypeVar("K", bound=Hashable)

_BACKOFF_BASE_S = 0.25
_BACKOFF_CAP_S = 300.0


def backoff_s(failures: int, jitter: float, *, base_s: float = _BACKOFF_BASE_S, cap_s: float = _BACKOFF_CAP_S) -> float:
    """Seconds to wait after the `failures`-th failure in a row (1, 2, ...): doubling, capped, half of it up to the jitter (0 to 1)."""
    full = min(cap_s, base_s * 2 ** min(failures - 1, 32))
    return full * (0.5 + 0.5 * jitter)


class Schedule(Generic[K]):
    """Which key is due when. Times are seconds of any one monotonic clock, passed in."""

    def __init__(self) -> None:
        self._urgent: OrderedDict[K, float] = OrderedDict()  # key -> since when
        self._ready: OrderedDict[K, float] = OrderedDict()
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []  # may hold entries that _due has since moved; they are dropped when popped
        self._sequence = 0
        self._working: set[K] = set()
        self._again: dict[K, float] = {}

    def add(self, key: K, now: float, *, urgent: bool = False) -> None:
        """Due now; where it is being worked on, once more afterwards. Urgent ones go before all others."""
        self._due.pop(key, None)
        if key in self._working:
            self._again.setdefault(key, now)
        elif urgent:
            self._urgent.setdefault(key, self._ready.pop(key, now))
        elif key not in self._urgent:
            self._ready.setdefault(key, now)

    def add_at(self, key: K, when: float) -> None:
        """Due at `when`, unless it is due earlier already."""
        if key in self._ready or key in self._urgent or key in self._again or self._due.get(key, float("inf")) <= when:
            return
        self._due[key] = when
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, key))

    def pop(self, now: float) -> K | None:
        """The key that has been ready longest, now being worked on until `done`; None where none is ready."""
        self._promote(now)
        waiting = self._urgent or self._ready
        if not waiting:
            return None
        key, _ = waiting.popitem(last=False)
        self._working.add(key)
        return key

    def done(self, key: K, now: float) -> None:
        self._working.remove(key)
        if self._again.pop(key, None) is not None:
            self._due.pop(key, None)
            self._ready.setdefault(key, now)

    def next_due(self) -> float | None:
        """When the earliest delayed key is due."""
        while self._heap and self._stale(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    @property
    def depth(self) -> int:
        """Keys that are ready, or wait for their worker to finish."""
        return len(self._urgent) + len(self._ready) + len(self._again)

    def oldest_age(self, now: float) -> float:
        """Seconds that the longest-waiting ready key has waited."""
        firsts = [next(iter(keys.values())) for keys in (self._urgent, self._ready) if keys]
        return max(0.0, now - min(firsts)) if firsts else 0.0

    def _promote(self, now: float) -> None:
        while (due := self.next_due()) is not None and due <= now:
            _, _, key = heapq.heappop(self._heap)
            del self._due[key]
            if key in self._working:
                self._again.setdefault(key, due)
            else:
                self._ready.setdefault(key, due)

    def _stale(self, entry: tuple[float, int, K]) -> bool:
        when, _, key = entry
        return self._due.get(key) != when


class WorkQueue(Generic[K]):
    """`Schedule` in an event loop. All methods are to be called from the loop's thread."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._jitter = jitter
        self._schedule: Schedule[K] = Schedule()
        self._failures: dict[K, int] = {}
        self._waiters: deque[asyncio.Future[None]] = deque()

    def add(self, key: K, *, urgent: bool = False) -> None:
        self._schedule.add(key, self._clock(), urgent=urgent)
        self._wake()

    def add_after(self, key: K, delay_s: float) -> None:
        self._schedule.add_at(key, self._clock() + max(0.0, delay_s))
        self._wake()

    def retry(self, key: K, *, at_least_s: float = 0.0) -> float:
        """Comes back after a delay that doubles with each failure in a row, and is no shorter than a server asked for. Returns it."""
        self._failures[key] = self._failures.get(key, 0) + 1
        delay_s = max(at_least_s, backoff_s(self._failures[key], self._jitter()))
        self.add_after(key, delay_s)
        return delay_s

    def forget(self, key: K) -> None:
        """The key did well: its next failure is its first."""
        self._failures.pop(key, None)

    def failures(self, key: K) -> int:
        return self._failures.get(key, 0)

    async def get(self) -> K:
        """The next key; waits until there is one. The caller owes a `done`."""
        while (key := self._schedule.pop(self._clock())) is None:
            await self._wait()
        return key

    def done(self, key: K) -> None:
        self._schedule.done(key, self._clock())
        self._wake()

    @property
    def depth(self) -> int:
        return self._schedule.depth

    @property
    def oldest_age_s(self) -> float:
        return self._schedule.oldest_age(self._clock())

    async def _wait(self) -> None:
        """Until something changes, or the next delayed key is due."""
        due = self._schedule.next_due()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await asyncio.wait([waiter], timeout=None if due is None else max(0.0, due - self._clock()))
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _wake(self) -> None:
        """One waiting worker looks again: one key was added, and the worker that takes it leaves the rest to the others."""
        if self._waiters:
            self._waiters.popleft().set_result(None)
