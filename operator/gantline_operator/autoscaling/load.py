"""From a sample to replicas' worth of load: 1.0 is what one replica is meant to carry. The one measure that every controller uses.

    inflight   (running + waiting) / target; auto: a share of the requests that one replica can run at once (`capacity.py`)
    kvCache    usage / (target / 100)
    queue      (running + waiting) / (0.8 * capacity + target): nearly as full as a replica can be, with `target` more waiting

The share of inflight is room for what comes while a further replica starts, so it follows from how long that takes: load is taken to grow
by its own size within `_GROWTH_S`, which leaves 57 % where a start takes half a minute, and 25 % where it takes two. It is never less than
20 % (what grows fivefold within one start needs `min`, not a guess) and never more than 80 % (of replicas that are wholly full, one that
goes is missed at once).

Requests that wait count at most as often as those that a replica can run. A queue tells how long there was too little rather than how much
is missing: twice as many replicas work it off, and where it still grows once they are there, they are doubled again.
"""

from __future__ import annotations

from gantline_operator.autoscaling.observation import Sample
from gantline_operator.autoscaling.policy import Policy

__all__ = ["meant", "replica_load", "request_load"]

_GROWTH_S = 40.0
"""docs/perf-log.md has what other values would cost, and what they would miss."""
_LEAST, _MOST = 0.2, 0.8


def replica_load(policy: Policy, sample: Sample, capacity: float) -> float:
    """What one replica carries, in replicas' worth. `capacity` is what one replica can run at once; less where it shows that it cannot."""
    if sample.full:
        capacity = min(capacity, sample.running)
    if policy.metric == "kvCache":
        return sample.cache_usage * (1 + min(1.0, sample.waiting / max(1, sample.running))) / (policy.target_or_auto / 100)
    return (sample.running + min(sample.waiting, capacity)) / meant(policy, capacity)


def request_load(policy: Policy, requests: float, capacity: float) -> float:
    """So many requests in replicas' worth, of which only the gateways know."""
    return requests / meant(policy, capacity)


def meant(policy: Policy, capacity: float) -> float:
    """Requests that one replica is meant to have, of the `capacity` that it can run at once."""
    if policy.metric == "kvCache":
        return max(1.0, capacity * policy.target_or_auto / 100)
    if policy.metric == "queue":
        return capacity * _MOST + policy.target_or_auto
    if policy.target is not None:
        return policy.target
    return max(1.0, capacity * min(_MOST, max(_LEAST, _GROWTH_S / (_GROWTH_S + policy.startup_s))))
