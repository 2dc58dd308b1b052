"""The operator's own /metrics.

Counters are incremented where things happen; queue and conditions are read at scrape time, so a deleted service leaves no series behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gantline_operator.cache_ledger import Ledger

__all__ = ["CacheMap", "ConditionMap", "Metrics"]

ConditionMap = Mapping[tuple[str, str], Iterable[Mapping[str, str]]]
"""(namespace, name) -> conditions as they stand in the status."""

CacheMap = Mapping[tuple[str, str], tuple[Ledger, int | None]]
"""(namespace, claim) -> what the claim holds, and the bytes that it may hold where that is known."""

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_VALUES = {"True": 1.0, "False": 0.0, "Unknown": -1.0}


class Metrics:
    """One registry for one operator, so that two in a process (tests) do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter("gantline_reconciles", "Reconciles by result: done, retry, error.", ["result"], registry=self.registry)
        self.errors = Counter("gantline_errors", "Errors by kind, of the API server or of ours.", ["kind"], registry=self.registry)
        self.reviews = Counter("gantline_admission_reviews", "Services that the webhook looked at.", ["result"], registry=self.registry)
        self.writes = Counter("gantline_writes", "Writes to the API server.", ["kind", "verb"], registry=self.registry)
        self.scalings = Counter("gantline_scalings", "Changes of replicas by load: up, down.", ["direction"], registry=self.registry)
        for direction in ("up", "down"):  # from zero, else a rate misses the first
            self.scalings.labels(direction)
        self.requests = Counter(
            "gantline_api_requests", "Requests to the API server; status 0: no answer.", ["method", "status"], registry=self.registry
        )
        self.duration = Histogram("gantline_reconcile_seconds", "Time of one reconcile.", registry=self.registry, buckets=_LATENCY_S)
        self.plan_duration = Histogram("gantline_plan_seconds", "Time of one plan.", registry=self.registry, buckets=_LATENCY_S)

        self.device_failures = Counter(
            "gantline_gpu_failures", "Pods that were replaced since a GPU failed, by node.", ["node"], registry=self.registry
        )
        self.evictions = Counter("gantline_cache_evictions", "Artefacts removed from cache volumes to make room.", registry=self.registry)
        self.evicted_bytes = Counter("gantline_cache_evicted_bytes", "Bytes of these.", registry=self.registry)

    def observe(
        self, queue: Callable[[], tuple[int, float]], conditions: Callable[[], ConditionMap], caches: Callable[[], CacheMap] = dict
    ) -> None:
        """`queue` answers (depth, age of the oldest in seconds)."""
        self.registry.register(_State(queue, conditions))
        self.registry.register(_Caches(caches))

    def observe_leader(self, leads: Callable[[], bool]) -> None:
        gauge = Gauge("gantline_leader", "1 for the operator that works, 0 for one that waits to take over.", registry=self.registry)
        gauge.set_function(lambda: float(leads()))


class _State(Collector):
    def __init__(self, queue: Callable[[], tuple[int, float]], conditions: Callable[[], ConditionMap]) -> None:
        self._queue = queue
        self._conditions = conditions

    def collect(self) -> Iterable[Metric]:
        depth, age_s = self._queue()
        yield GaugeMetricFamily("gantline_queue_depth", "Services that wait to be reconciled.", value=depth)
        yield GaugeMetricFamily("gantline_queue_oldest_seconds", "How long the first of them has waited.", value=age_s)
        services = dict(self._conditions())
        yield GaugeMetricFamily("gantline_services", "Services that the operator knows.", value=len(services))
        family = GaugeMetricFamily(
            "gantline_condition", "Conditions: 1 True, 0 False, -1 Unknown.", labels=["namespace", "service", "type", "reason"]
        )
        for (namespace, name), conditions in services.items():
            for item in conditions:
                family.add_metric([namespace, name, item["type"], item["reason"]], _VALUES.get(item["status"], -1.0))
        yield family


class _Caches(Collector):
    """Cache volumes as their services' last reconcile saw them."""

    def __init__(self, caches: Callable[[], CacheMap]) -> None:
        self._caches = caches

    def collect(self) -> Iterable[Metric]:
        held = GaugeMetricFamily(
            "gantline_cache_bytes",
            "Bytes of artefacts in a cache volume: used, or unused (may be evicted).",
            labels=["namespace", "claim", "state"],
        )
        limits = GaugeMetricFamily("gantline_cache_limit_bytes", "Most bytes that they may take.", labels=["namespace", "claim"])
        for (namespace, claim), (ledger, limit) in dict(self._caches()).items():
            for state, in_use in (("used", True), ("unused", False)):
                total = sum(entry.bytes for entry in ledger.entries.values() if bool(entry.users) == in_use)
                held.add_metric([namespace, claim, state], total)
            if limit is not None:
                limits.add_metric([namespace, claim], limit)
        yield held
        yield limits
