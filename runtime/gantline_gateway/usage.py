"""What each API key used: counters at /metrics. Names of keys are shown, keys never."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter, Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from gantline_gateway.traffic import Usage

__all__ = ["UsageCounters"]


class UsageCounters(Collector):
    """By the key's name, which is empty where nobody needs a key."""

    def __init__(self) -> None:
        def counter(name: str, about: str, *more: str) -> Counter:
            return Counter(f"gantline_gateway_key_{name}", about, ("key", *more), registry=None)

        self._requests = counter("requests", "Requests of an API key that named a model which it may use.")
        self._prompt = counter("prompt_tokens", "Tokens of the prompts of an API key's requests.")
        self._cached = counter("cached_tokens", "Tokens of those prompts that an engine had computed before.")
        self._completion = counter("completion_tokens", "Tokens of the answers to an API key.")
        self._limited = counter("limited", "Requests that a limit of their API key refused.", "limit")
        self.sharing = Gauge("gantline_gateway_sharing", "Gateways over which limits of API keys are split.", registry=None)
        self.sharing.set(1)

    def collect(self) -> Iterable[Metric]:
        for counter in (self._requests, self._prompt, self._cached, self._completion, self._limited, self.sharing):
            yield from counter.collect()

    def count(self, key: str, usage: Usage) -> None:
        """One request that has ended, whether or not its answer did."""
        self._requests.labels(key).inc()
        self._prompt.labels(key).inc(usage.prompt)
        self._cached.labels(key).inc(usage.cached)
        self._completion.labels(key).inc(usage.completion)
        for limit in ("tokens", "concurrency"):  # from zero, else a rate misses the first
            self._limited.labels(key, limit)

    def count_limited(self, key: str, limit: str) -> None:
        """One request that was refused: `tokens` or `concurrency` had been used up."""
        self._limited.labels(key, limit).inc()
