"""From a sample to replicas' worth of load: 1.0 is what one replica is meant to carry. The one measure that every controller uses.

    inflight   (running + waiting) / target
    kvCache    usage / (target / 100); requests that wait would need cache as those that run do, so they count in proportion, once over
    queue      (running + waiting) / (0.8 * capacity + target): nearly as full as a replica can be, with `target` more waiting

A queue's length says nothing about how many replicas are needed while it is empty: an autoscaler that follows it removes replicas that are
busy, and starts them again. So `queue` asks how many requests one engine can run at once. One that lets requests wait runs as many as it
can; of others it is what has been proven: the largest number that a replica was seen running, until some replica was full with fewer
(longer prompts). What is proven is never more than what was true, so a service is too large sooner than too small.
"""

from __future__ import annotations

from collections.abc import Collection

from gantline_operator.autoscaling.observation import Sample
from gantline_operator.autoscaling.policy import Policy

__all__ = ["prove", "replica_load", "request_load"]

_FULL = 0.8
"""Share of its capacity that a replica is meant to use. Where all run full, one that went is missed at once: with 1.0 a simulated day has
three times the flaps (docs/perf-log.md)."""


def replica_load(policy: Policy, sample: Sample, proven: int) -> float:
    """What one replica carries, in replicas' worth. `proven` is 0 where nothing has been seen yet."""
    requests = sample.running + sample.waiting
    if policy.metric == "inflight":
        return requests / policy.target
    if policy.metric == "kvCache":
        return sample.cache_usage * (1 + min(1.0, sample.waiting / max(1, sample.running))) / (policy.target / 100)
    capacity = sample.running if sample.waiting else max(proven, sample.running)
    return requests / (capacity * _FULL + policy.target)


def request_load(policy: Policy, requests: int, proven: int) -> float:
    """So many requests in replicas' worth, of which only the gateways know. Where nothing is proven, an engine's own bound stands."""
    if policy.metric == "inflight":
        return requests / policy.target
    capacity = proven or policy.max_batch
    return requests / (capacity if policy.metric == "kvCache" else capacity * _FULL + policy.target)


def prove(policy: Policy, samples: Collection[Sample], proven: int) -> int:
    """Requests that one replica can run at once, after these samples."""
    full = [sample.running for sample in samples if sample.waiting > policy.target]
    return max(full) if full else max([proven, *(sample.running for sample in samples)])
