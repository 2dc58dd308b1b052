"""A queue of keys to be reconciled: each key by one worker at a time, however many events named it.

                  add                         get                      done
    (unknown) ---------->  ready  ------------------------->  working ------> (unknown)
        |                    ^  ^                                |
        | add_after, retry   |  |  add while working: again      |
        +----> delayed ------+  +----------- once done ----------+
                  when due

`Schedule` is the bookkeeping: plain, without a clock of its own. `WorkQueue` adds a loop's time and a way to wait. Failures back off
exponentially per key with jitter, so that a thousand services do not come back in one instant when the API server does. So does a key whose
work asks to be done again at once, time after time.
"""

from __future__ import annotations

import asyncio
import enum
import heapq
import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["BACKOFF_CAP_S", "RETURN_S", "Rank", "Schedule", "WorkQueue", "backoff_s"]

K = TypeVar("K", bound=Hashable)

RETURN_S = 2.0
"""Most seconds between two attempts of a watch to reach the API server. There are few watches, and nobody is served while they are away."""
_BACKOFF_BASE_S = 0.25
BACKOFF_CAP_S = 300.0
_AT_ONCE_S = 0.5
"""A key that is to come back sooner than this comes at once; whoever polls waits longer."""
_FLOOR_S, _FLOOR_CAP_S = 0.05, 60.0
"""Least delay of a key that comes back at once the first time, and after many times in a row."""


def backoff_s(failures: int, jitter: float, *, base_s: float = _BACKOFF_BASE_S, cap_s: float = BACKOFF_CAP_S) -> float:
    """Seconds to wait after the `failures`-th failure in a row (1, 2, ...): doubling, capped, half of it up to the jitter (0 to 1)."""
    full = min(cap_s, base_s * 2 ** min(failures - 1, 32))
    return full * (0.5 + 0.5 * jitter)


class Rank(enum.IntEnum):
    """Whose turn comes first: somebody watches what is new; what changed goes before what is only looked at again."""

    NEW = 0
    CHANGED = 1
    ROUTINE = 2


class Schedule(Generic[K]):
    """Which key is due when. Times are seconds of any one monotonic clock, passed in."""

    def __init__(self) -> None:
        self._ready: dict[Rank, OrderedDict[K, float]] = {rank: OrderedDict() for rank in Rank}  # key -> since when
        self._due: dict[K, tuple[float, Rank]] = {}
        self._heap: list[tuple[float, int, K]] = []  # may hold entries that _due has since moved; they are dropped when popped
        self._sequence = 0
        self._working: set[K] = set()
        self._again: dict[K, float] = {}

    def add(self, key: K, now: float, rank: Rank = Rank.CHANGED) -> None:
        """Due now; where it is being worked on, once more afterwards."""
        self._due.pop(key, None)
        if key in self._working:
            self._again.setdefault(key, now)
        else:
            self._put(key, now, rank)

    def add_at(self, key: K, when: float, rank: Rank = Rank.CHANGED) -> None:
        """Due at `when`, unless it is due earlier already."""
        if self._rank(key) is not None or key in self._again or (key in self._due and self._due[key][0] <= when):
            return
        self._due[key] = (when, rank)
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, key))

    def pop(self, now: float) -> K | None:
        """Of the first rank that has any, the key that has been ready longest, now being worked on until `done`; None: none is ready."""
        self._promote(now)
        for waiting in self._ready.values():
            if waiting:
                key, _ = waiting.popitem(last=False)
                self._working.add(key)
                return key
        return None

    def done(self, key: K, now: float) -> None:
        self._working.remove(key)
        if self._again.pop(key, None) is not None:
            self._due.pop(key, None)
            self._put(key, now, Rank.CHANGED)

    def next_due(self) -> float | None:
        """When the earliest delayed key is due."""
        while self._heap and self._stale(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    @property
    def depth(self) -> int:
        """Keys that are ready, or wait for their worker to finish."""
        return sum(map(len, self._ready.values())) + len(self._again)

    def oldest_age(self, now: float) -> float:
        """Seconds that the longest-waiting ready key has waited."""
        firsts = [next(iter(keys.values())) for keys in self._ready.values() if keys]
        return max(0.0, now - min(firsts)) if firsts else 0.0

    def _promote(self, now: float) -> None:
        while (due := self.next_due()) is not None and due <= now:
            _, _, key = heapq.heappop(self._heap)
            _, rank = self._due.pop(key)
            if key in self._working:
                self._again.setdefault(key, due)
            else:
                self._put(key, due, rank)

    def _put(self, key: K, since: float, rank: Rank) -> None:
        """Ready, by the better of its ranks."""
        before = self._rank(key)
        if before is None or rank < before:
            since = since if before is None else self._ready[before].pop(key)
            self._ready[rank][key] = since

    def _rank(self, key: K) -> Rank | None:
        return next((rank for rank, keys in self._ready.items() if key in keys), None)

    def _stale(self, entry: tuple[float, int, K]) -> bool:
        when, _, key = entry
        return key not in self._due or self._due[key][0] != when


class WorkQueue(Generic[K]):
    """`Schedule` in an event loop. All methods are to be called from the loop's thread."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._jitter = jitter
        self._schedule: Schedule[K] = Schedule()
        self._failures: dict[K, int] = {}
        self._at_once: dict[K, int] = {}
        self._waiters: deque[asyncio.Future[None]] = deque()

    def add(self, key: K, rank: Rank = Rank.CHANGED) -> None:
        self._schedule.add(key, self._clock(), rank)
        self._wake()

    def add_after(self, key: K, delay_s: float, rank: Rank = Rank.CHANGED) -> None:
        self._schedule.add_at(key, self._clock() + max(0.0, delay_s), rank)
        self._wake()

    def retry(self, key: K, *, at_least_s: float = 0.0, cap_s: float = BACKOFF_CAP_S) -> float:
        """Comes back after a delay that doubles with each failure in a row up to `cap_s`, and is no shorter than a server asked for.
        Returns it."""
        self._failures[key] = self._failures.get(key, 0) + 1
        delay_s = max(at_least_s, backoff_s(self._failures[key], self._jitter(), cap_s=cap_s))
        self.add_after(key, delay_s)
        return delay_s

    def succeed(self, key: K, again_s: float | None) -> None:
        """The key did well: its next failure is its first. It comes back after `again_s`, None: when something is added for it.

        A step that has to be followed by another one at once is followed by it; work that asks for that time after time gets nowhere, and
        waits twice as long each time until it asks for less. Neither a failure in between nor an event ends that, and an event does not
        wait for it.
        """
        self._failures.pop(key, None)
        if again_s is None or again_s >= _AT_ONCE_S:
            self._at_once.pop(key, None)
        else:
            self._at_once[key] = times = self._at_once.get(key, 0) + 1
            again_s = max(backoff_s(times, 1.0, base_s=_FLOOR_S, cap_s=_FLOOR_CAP_S), again_s)
        if again_s is not None:
            self.add_after(key, again_s)

    def forget(self, key: K) -> None:
        """There is no such key any more."""
        self._failures.pop(key, None)
        self._at_once.pop(key, None)

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
