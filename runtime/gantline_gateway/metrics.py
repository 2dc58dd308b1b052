"""/metrics, read from the traffic's numbers at scrape time: a service that is gone leaves no series behind."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gantline_gateway.directory import Directory
from gantline_gateway.traffic import OUTCOMES, RETRY_CAUSES, Histogram, ServiceTraffic, Traffic

__all__ = ["Metrics"]

_SERVICE = ("namespace", "service")


class Metrics(Collector):
    """Of one gateway."""

    def __init__(self, traffic: Traffic, directory: Directory, version: str) -> None:
        self._traffic, self._directory, self._version = traffic, directory, version
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def register(self, collector: Collector) -> None:
        """Further metrics on the same page."""
        self._registry.register(collector)

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("gantline_gateway_services", "Services that the gateway knows.", len(self._directory.catalog.services))
        build = GaugeMetricFamily("gantline_gateway_build", "1, with the version as label.", labels=["version"])
        build.add_metric([self._version], 1)
        yield build
        yield self._replicas()
        unserved = CounterMetricFamily(
            "gantline_gateway_unserved", "Requests that reached no service, by the error's code.", labels=["code"]
        )
        for code, count in sorted(self._traffic.unserved.items()):
            unserved.add_metric([code], count)
        yield unserved
        known = [(tuple(key.split("/", 1)), traffic) for key, traffic in self._traffic.known()]
        yield from _counters(known)
        yield from _gauges(known)
        added = "Time in the gateway until a replica was asked, without holding."
        yield _histogram("gantline_gateway_added_seconds", added, known, "added_s")
        yield _histogram("gantline_gateway_held_seconds", "How long requests waited for a replica, those that had to.", known, "held_s")

    def _replicas(self) -> Metric:
        family = GaugeMetricFamily("gantline_gateway_replicas", "Replicas that requests are sent to.", labels=_SERVICE)
        for service in self._directory.catalog.services:
            family.add_metric([service.namespace, service.name], len(service.usable))
        return family


_Known = list[tuple[tuple[str, ...], ServiceTraffic]]


def _counters(known: _Known) -> Iterable[Metric]:
    tables = (
        ("requests", f"Requests by outcome: {', '.join(OUTCOMES)}.", "outcome", "outcomes"),
        ("retries", f"Attempts that were made good elsewhere or later, by cause: {', '.join(RETRY_CAUSES)}.", "cause", "retries"),
        ("tokens", "Tokens by kind: prompt, cached (of those), completion.", "kind", "tokens"),
    )
    for name, text, label, attribute in tables:
        family = CounterMetricFamily(f"gantline_gateway_{name}", text, labels=[*_SERVICE, label])
        for labels, traffic in known:
            for value, count in sorted(getattr(traffic, attribute).items()):
                family.add_metric([*labels, value], count)
        yield family


def _gauges(known: _Known) -> Iterable[Metric]:
    running = GaugeMetricFamily("gantline_gateway_running", "Requests that a replica has.", labels=_SERVICE)
    held = GaugeMetricFamily("gantline_gateway_held", "Requests that wait for a replica.", labels=_SERVICE)
    for labels, traffic in known:
        running.add_metric(labels, traffic.running)
        held.add_metric(labels, len(traffic.held))
    yield running
    yield held


def _histogram(name: str, text: str, known: _Known, attribute: str) -> Metric:
    family = HistogramMetricFamily(name, text, labels=_SERVICE)
    for labels, traffic in known:
        histogram: Histogram = getattr(traffic, attribute)
        family.add_metric(labels, _buckets(histogram), histogram.total)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus counts them."""
    buckets, sum_so_far = [], 0
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        sum_so_far += count
        buckets.append((bound, float(sum_so_far)))
    return buckets
