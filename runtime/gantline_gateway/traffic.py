"""What runs and waits now, and what has been: plain numbers for each service, behind choosing replicas, /metrics and /demand.

Requests change them where things happen, on one event loop; readers take them as they are. A service that goes takes its numbers along.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

__all__ = ["ADDED_BOUNDS_S", "HELD_BOUNDS_S", "OUTCOMES", "RETRY_CAUSES", "Histogram", "ServiceTraffic", "Traffic", "Usage"]

ADDED_BOUNDS_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
HELD_BOUNDS_S = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0)

OUTCOMES = ("ok", "refused", "busy", "failed", "left", "cut")
RETRY_CAUSES = ("unreachable", "not_ready", "busy", "reset")

_FIRST_GUESS_TOKENS = 256.0
"""Length of an answer before any was seen."""
_MEMORY = 0.05
"""Weight of the latest answer in the mean: some twenty answers count."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one request. `exact`: as the replica reported; otherwise the prompt is estimated and the answer's events are counted."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    exact: bool = False


class Histogram:
    """Counts of what lay at or below each of `bounds`, the last count for what lay above all."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass
class ServiceTraffic:
    """Of one service. Times are of `Traffic.clock`, seconds."""

    running: int = 0
    """Requests that a replica has."""
    held: dict[int, float] = field(default_factory=dict)
    """Requests that wait for a replica, each with the time since when."""
    last_request_at: float | None = None
    outstanding: Counter[str] = field(default_factory=Counter)
    """Predicted tokens that each replica has been given, by its identity."""
    answer_tokens: float = _FIRST_GUESS_TOKENS
    """Mean length of the latest answers."""
    outcomes: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(OUTCOMES, 0)))
    retries: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(RETRY_CAUSES, 0)))
    """These two from zero, else a rate would miss the first failure."""
    tokens: Counter[str] = field(default_factory=Counter)
    added_s: Histogram = field(default_factory=lambda: Histogram(ADDED_BOUNDS_S))
    held_s: Histogram = field(default_factory=lambda: Histogram(HELD_BOUNDS_S))

    def predict_tokens(self, prompt_tokens: int, max_tokens: int | None, choices: int) -> int:
        """What a request will cost a replica: its prompt, and answers of the usual length unless it allows less."""
        answer = self.answer_tokens if max_tokens is None else min(self.answer_tokens, max_tokens)
        return max(1, prompt_tokens + int(answer) * choices)

    def charge(self, replica: str, tokens: int) -> None:
        self.running += 1
        self.outstanding[replica] += tokens

    def discharge(self, replica: str, tokens: int) -> None:
        self.running -= 1
        self.outstanding[replica] -= tokens
        if self.outstanding[replica] <= 0:
            del self.outstanding[replica]

    def count_usage(self, usage: Usage, choices: int) -> None:
        self.tokens["prompt"] += usage.prompt
        self.tokens["completion"] += usage.completion
        self.tokens["cached"] += usage.cached
        if usage.exact and usage.completion:
            self.answer_tokens += _MEMORY * (usage.completion / choices - self.answer_tokens)


class Traffic:
    """Of all services, by `namespace/name`. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._services: dict[str, ServiceTraffic] = {}
        self.unserved: Counter[str] = Counter()
        """Requests that were refused before it was known whose they are, by the error's code."""

    def of(self, key: str) -> ServiceTraffic:
        found = self._services.get(key)
        if found is None:
            found = self._services[key] = ServiceTraffic()
        return found

    def known(self) -> list[tuple[str, ServiceTraffic]]:
        return sorted(self._services.items())

    def forget_all_but(self, keys: Iterable[str]) -> None:
        """Services that are gone, once nothing of them runs."""
        kept = set(keys)
        for key in [key for key, traffic in self._services.items() if key not in kept and not traffic.running and not traffic.held]:
            del self._services[key]
