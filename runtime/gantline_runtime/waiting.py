"""Who runs next: the order of the requests that wait.

1. Those that ran before and gave up their blocks, in the order of arrival: they have been answered in part.
2. One that has waited for `_MOST_OVERTAKEN_S`: nobody is overtaken for ever.
3. The lower `priority` number.
4. Fairness between tenants (API keys), by start-time fair queueing (Goyal, Vin, Cheng 1996): each request begins, in virtual time, where
   its tenant's last one ended, and lasts as long as its predicted tokens over the tenant's weight; who begins first runs first. A tenant
   that was idle begins now, so it gains nothing by waiting. With one tenant this is the order of arrival.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterator

from gantline_runtime.request import Sequence

__all__ = ["WaitingQueue"]

_MOST_OVERTAKEN_S = 60.0


class WaitingQueue:
    """`clock` is monotonic, in seconds, as `Sequence.arrived_at`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._returned: list[Sequence] = []
        self._order: list[tuple[int, float, int, Sequence]] = []
        """A heap of (priority, virtual start, arrival, sequence), with some that have left."""
        self._unready: list[tuple[int, float, int, Sequence]] = []
        """Taken out of `_order` until they can run (their grammars are compiled)."""
        self._by_age: deque[Sequence] = deque()
        self._members: set[Sequence] = set()
        self._virtual_time = 0.0
        self._virtual_end: dict[str, float] = {}
        self._of_tenant: Counter[str] = Counter()
        self.num_tokens = 0
        """Predicted tokens of all that wait."""

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        """In the order in which they would run, if nobody waited for too long."""
        yield from self._returned
        yield from (entry[-1] for entry in sorted(self._order + self._unready) if entry[-1] in self._members)

    def num_of(self, tenant: str) -> int:
        return self._of_tenant[tenant]

    def add(self, sequence: Sequence) -> None:
        """A request that has just arrived."""
        start = max(self._virtual_time, self._virtual_end.get(sequence.tenant, 0.0))
        self._virtual_end[sequence.tenant] = start + sequence.predicted_tokens / sequence.weight
        heapq.heappush(self._order, (sequence.priority, start, sequence.arrival, sequence))
        self._by_age.append(sequence)
        self._enter(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """A request that ran and was preempted."""
        insort(self._returned, sequence, key=lambda s: s.arrival)
        self._enter(sequence)

    def _enter(self, sequence: Sequence) -> None:
        self._members.add(sequence)
        self._of_tenant[sequence.tenant] += 1
        self.num_tokens += sequence.predicted_tokens

    def first(self) -> Sequence | None:
        """Who runs next; None if nobody waits who can run."""
        if self._returned:
            return self._returned[0]
        self._sort_out()
        while self._by_age and self._by_age[0] not in self._members:
            self._by_age.popleft()
        if not self._order:
            return None
        oldest = self._by_age[0]
        overtaken = oldest.ready and self._clock() - oldest.arrived_at > _MOST_OVERTAKEN_S
        return oldest if overtaken else self._order[0][-1]

    def _sort_out(self) -> None:
        """Have the head of `_order` be one that waits and can run."""
        for entry in [entry for entry in self._unready if entry[-1].ready or entry[-1] not in self._members]:
            self._unready.remove(entry)
            heapq.heappush(self._order, entry)
        while self._order and (self._order[0][-1] not in self._members or not self._order[0][-1].ready):
            entry = heapq.heappop(self._order)
            if entry[-1] in self._members:
                self._unready.append(entry)

    def take(self, sequence: Sequence) -> None:
        """`sequence`, which is `first`, runs."""
        if self._order and self._order[0][-1] is sequence:
            self._virtual_time = max(self._virtual_time, self._order[0][1])
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It runs, or it was given up."""
        self._members.remove(sequence)
        if sequence in self._returned:
            self._returned.remove(sequence)
        self._of_tenant[sequence.tenant] -= 1
        if not self._of_tenant[sequence.tenant]:
            del self._of_tenant[sequence.tenant]
        self.num_tokens -= sequence.predicted_tokens
        if not self._members:  # virtual time has nobody left to compare
            self._order.clear()
            self._unready.clear()
            self._by_age.clear()
            self._virtual_end.clear()
            self._virtual_time = 0.0
