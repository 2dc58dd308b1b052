"""How many requests one replica can run at once, learnt from what replicas say of themselves.

Three bounds, the least of which holds:

    batch   what the engine was started with
    cache   the requests of all replicas over the share of their caches that these hold: so many would fill one. A mean over `_MEMORY_S`,
            in which a look counts for as much as there was to see, so a few long requests in a quiet hour do not change it
    full    what a replica ran that let others wait, until one runs more, or `_KEPT_S` have passed: prompts were different then
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from gantline_operator.autoscaling.observation import Sample

__all__ = ["Capacity"]

_MEMORY_S = 600.0
_KEPT_S = 3600.0


@dataclass(frozen=True)
class Capacity:
    at: float = 0.0
    requests: float = 0.0
    usage: float = 0.0
    """Both faded sums."""
    full: tuple[float, int] | None = None
    """(when, requests) of a replica that could not run more."""

    def learn(self, now: float, samples: Collection[Sample]) -> Capacity:
        fade = math.exp(-max(0.0, now - self.at) / _MEMORY_S)
        return Capacity(
            now,
            self.requests * fade + sum(sample.running for sample in samples),
            self.usage * fade + sum(sample.cache_usage for sample in samples),
            self._full(now, samples),
        )

    def of(self, max_batch: int) -> float:
        """Requests that one replica can run at once; never less than one."""
        cache = self.requests / self.usage if self.usage > 0 and self.requests > 0 else max_batch
        return max(1.0, min(max_batch, cache, self.full[1] if self.full is not None else max_batch))

    def _full(self, now: float, samples: Collection[Sample]) -> tuple[float, int] | None:
        full = [sample.running for sample in samples if sample.full]
        if full:
            return now, max(full)
        if self.full is None or now - self.full[0] >= _KEPT_S:
            return None
        return self.full[0], max(self.full[1], *(sample.running for sample in samples), 0)
