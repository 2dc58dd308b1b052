"""A model of replicas that serve requests, second by second: what the simulated day is replayed against.

A replica takes a while to start; it then runs up to `BATCH` requests at once, each the slower the more there are, and queues the rest.
Requests go to the replica with the fewest; while none is ready they are held. A replica that is to go takes no more and ends once empty.
Figures are an 8B model's on one GPU, rounded: what matters to a comparison is that all controllers meet the same.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["BATCH", "Fleet", "Request"]

BATCH = 32
_PREFILL_S = 0.3
_TOKEN_S, _TOKEN_S_PER_RUNNING = 0.020, 0.0006
"""Seconds of one token alone, and what each request beside it adds: 39 ms with all 32."""


@dataclass(frozen=True)
class Request:
    at: float
    tokens: int


@dataclass
class Replica:
    name: str
    ready_at: float
    going: bool = False
    served: int = 0
    queue: deque[Request] = field(default_factory=deque)
    _made: float = 0.0
    """Tokens that each request would have made, had it run from the start: all running ones make them at one pace."""
    _ends: list[float] = field(default_factory=list)

    @property
    def running(self) -> int:
        return len(self._ends)

    @property
    def requests(self) -> int:
        return len(self._ends) + len(self.queue)

    def step(self, now: float, first_tokens: list[tuple[Request, float]]) -> None:
        """One second. Notes the time to the first token of requests that begin to run."""
        if self._ends:
            self._made += 1 / (_TOKEN_S + _TOKEN_S_PER_RUNNING * self.running)
            while self._ends and self._ends[0] <= self._made:
                heapq.heappop(self._ends)
        while self.queue and self.running < BATCH:
            request = self.queue.popleft()
            self.served += 1
            first_tokens.append((request, now - request.at + _PREFILL_S))
            heapq.heappush(self._ends, self._made + request.tokens)


class Fleet:
    """The replicas of one service. `startup_s` are the start-up times of its replicas in turn."""

    def __init__(self, startup_s: Sequence[float], *, replicas: int, gpu_per_replica: int = 1) -> None:
        self.replicas = [Replica(f"r{index}", 0.0) for index in range(replicas)]
        self.held: deque[Request] = deque()
        self.first_tokens: list[tuple[Request, float]] = []
        self.gpu_seconds = 0.0
        self._startup_s = startup_s
        self._gpu_per_replica = gpu_per_replica
        self._started = replicas
        self._last_request = float("-inf")

    @property
    def current(self) -> int:
        return sum(not replica.going for replica in self.replicas)

    def ready(self, now: float) -> list[Replica]:
        return [replica for replica in self.replicas if not replica.going and replica.ready_at <= now]

    def quiet_s(self, now: float) -> float | None:
        """Since the last request; None where there was none."""
        return None if self._last_request == float("-inf") else now - self._last_request

    def step(self, now: float, arrivals: Sequence[Request]) -> None:
        """One second: requests arrive, are spread, and run."""
        ready = self.ready(now)
        self.held.extend(arrivals)
        if arrivals:
            self._last_request = now
        while self.held and ready:
            min(ready, key=lambda replica: replica.requests).queue.append(self.held.popleft())
        for replica in self.replicas:
            if replica.ready_at <= now:
                replica.step(now, self.first_tokens)
        self.replicas = [replica for replica in self.replicas if not replica.going or replica.requests]
        self.gpu_seconds += self._gpu_per_replica * len(self.replicas)

    def scale(self, now: float, wanted: int, *, least_loaded: bool) -> None:
        """More start now; of fewer those that are still starting go first, then by load or the youngest, as a ReplicaSet chooses."""
        for _ in range(wanted - self.current):
            startup_s = self._startup_s[self._started % len(self._startup_s)]
            self.replicas.append(Replica(f"r{self._started}", now + startup_s))
            self._started += 1
        there = [replica for replica in self.replicas if not replica.going]
        there.sort(key=lambda replica: (replica.ready_at <= now, replica.requests if least_loaded else 0, -replica.ready_at))
        for replica in there[: max(0, len(there) - wanted)]:
            replica.going = True
