"""How many replicas, and why. Pure: equal arguments give an equal answer.

Rules, in order; the first that has an opinion decides:

    bounds     below min or above max: the spec was changed, and knowledge of load is not needed
    wake       at zero: the first held request starts a replica
    grow       the load certainly asks for more than the replicas: at once, for what is there now. Replicas that are starting count, so
               nothing piles up
    unknown    some replica's load is not known, or is stale: hold (or, with onUnknown: Max and no replica known at all, max)
    rolling    two revisions are about: hold
    sleep      min is 0, and every replica and every gateway has said for `zero_after_s` that nobody asks
    shrink     the certain load allowed for fewer throughout `down_after_s`
    steady     as it is

What is certain of the load is its mean over a minute, or what of the load of now cannot be chance, whichever is more. The mean keeps
replicas from following each coincidence of a few requests; a burst is more than chance within a look or two, and every second of it counts.

A band of `tolerance` around what replicas are meant to carry keeps load that hovers at a border from moving anything: more replicas are
wanted only for what exceeds it, fewer only for what stays below it, so one step ends inside, and constant load is answered at most once. It
is as wide as it is because requests stay longer at a replica that has more of them: one replica more or less changes their number too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from gantline_operator.autoscaling.capacity import Capacity
from gantline_operator.autoscaling.load import meant, replica_load, request_load
from gantline_operator.autoscaling.observation import Observation, Replica
from gantline_operator.autoscaling.policy import Policy

__all__ = ["Decision", "Memory", "ScaleReason", "decide", "owned", "told_load"]

_ROOTS = 2.0
"""A number of requests is this many of its roots off its mean once in forty looks."""
_ROUNDING = 1e-9  # 3 * 0.1 / 0.1 is more than 3
_SOME = 0.001
"""More than nothing, also once it is rounded."""
_TOLD_S = 15.0
"""How long it is told that somebody asked: three of KEDA's polls, of which one may be late and one fail."""


class ScaleReason(StrEnum):
    BELOW_MIN = "BelowMin"
    ABOVE_MAX = "AboveMax"
    HELD_REQUESTS = "HeldRequests"
    AT_ZERO = "AtZero"
    LOAD_ROSE = "LoadRose"
    LOAD_FELL = "LoadFell"
    IDLE = "Idle"
    METRICS_UNKNOWN = "MetricsUnknown"
    ROLLING_OUT = "RollingOut"
    STEADY = "Steady"


@dataclass(frozen=True)
class Decision:
    replicas: int
    reason: ScaleReason
    inputs: str
    """What it was decided from, as a person reads it."""


@dataclass(frozen=True)
class Memory:
    """What decisions remember of earlier observations. Losing it delays what makes a service smaller, and nothing else."""

    recent: tuple[tuple[float, float], ...] = ()
    """(when, load) within `mean_s`."""
    certain: float = 0.0
    """The load without what may be chance."""
    peaks: tuple[tuple[float, float], ...] = ()
    """(when, load) within `down_after_s`, without those that a later one exceeds: the first is the largest. Load is what was certain, the
    mean of however short a time, or what replicas were started for."""
    known_since: float | None = None
    """Since when the load has been known without a gap."""
    capacity: Capacity = Capacity()
    """What one replica can run at once."""
    idle_since: float | None = None
    served: Mapping[str, float] = field(default_factory=dict)
    """By replica: a counter that stands still while nobody asks."""


def decide(policy: Policy, seen: Observation, memory: Memory) -> tuple[Decision, Memory]:
    """The replicas that the service should have now, and what to remember for the next time."""
    memory, load = _remember(policy, seen, memory)
    replicas, reason = _choose(policy, seen, memory, load)
    if replicas > seen.current:  # what is started for a load must not go again while that is not certain yet
        memory = replace(memory, peaks=_add_peak(policy, seen.now, memory.peaks, load))
    return Decision(replicas, reason, _inputs(policy, seen, memory, load)), memory


def owned(policy: Policy, current: int, decision: Decision) -> int:
    """What of a decision is Gantline's to write, where another controller has the rest: KEDA all, HPA everything from one replica on.

    HPA never touches a service at zero, so both ways of the step between zero and one are ours.
    """
    if policy.controller == "Gantline":
        return decision.replicas
    if policy.controller == "HPA" and current == 0 and decision.replicas > 0:
        return policy.floor
    if policy.controller == "HPA" and current == 1 and decision.replicas == 0:
        return 0
    return current


def told_load(policy: Policy, seen: Observation, memory: Memory) -> float | None:
    """A service's load in replicas' worth for whoever scales it by that alone (KEDA), `memory` being what `decide` made of `seen`. None
    where it is not wholly known, so that nobody takes the unknown for idle.

    It is 0 only where the service may sleep: a held request alone wakes it, while it starts it stays awake, and whoever asked a moment ago
    still counts.
    """
    if _unknown(policy, seen) or (policy.min == 0 and (seen.demand is None or not seen.demand.complete)):
        return None
    load = memory.recent[-1][1]
    if seen.current == 0:
        return max(load, _SOME) if seen.demand is not None and seen.demand.held else 0.0
    starting = not any(replica.ready for replica in seen.replicas)
    asked = memory.idle_since is None or seen.now - memory.idle_since < _TOLD_S
    return max(load, _SOME) if starting or asked else load


def _choose(policy: Policy, seen: Observation, memory: Memory, load: float) -> tuple[int, ScaleReason]:
    current = seen.current
    held = seen.demand.held if seen.demand else 0
    if current < policy.min:
        return policy.min, ScaleReason.BELOW_MIN
    if current > policy.max:
        return policy.max, ScaleReason.ABOVE_MAX
    if current == 0:
        return (_within(policy, _at_least(load, policy.tolerance)), ScaleReason.HELD_REQUESTS) if held else (0, ScaleReason.AT_ZERO)
    if _within(policy, _at_least(memory.certain, policy.tolerance)) > current:
        return _within(policy, _at_least(max(load, memory.certain), policy.tolerance)), ScaleReason.LOAD_ROSE
    if _unknown(policy, seen):
        blind = not any(replica.fresh(seen.now, policy.stale_after_s) for replica in seen.replicas)
        return (policy.max if blind and policy.on_unknown == "Max" else current), ScaleReason.METRICS_UNKNOWN
    if seen.rolling:
        return current, ScaleReason.ROLLING_OUT
    if policy.min == 0 and _idle(policy, seen, memory):
        return 0, ScaleReason.IDLE
    if memory.known_since is not None and seen.now - memory.known_since >= policy.down_after_s:
        wanted = _within(policy, _at_most(memory.peaks[0][1], policy.tolerance))
        if wanted < current:
            return wanted, ScaleReason.LOAD_FELL
    return current, ScaleReason.STEADY


def _within(policy: Policy, replicas: int) -> int:
    return min(policy.max, max(policy.floor, replicas))


def _at_least(load: float, tolerance: float) -> int:
    """Fewest replicas that the load does not overload."""
    return math.ceil(load / (1 + tolerance) - _ROUNDING)


def _at_most(load: float, tolerance: float) -> int:
    """Fewest replicas that the load leaves some room in; never fewer than `_at_least`."""
    return math.ceil(load / (1 - tolerance) - _ROUNDING)


def _certain(policy: Policy, recent: tuple[tuple[float, float], ...], requests: float) -> float:
    """The mean over a whole `mean_s`, or what of the load of now is more than chance. Requests come and go, so that their number is off its
    mean by about its root."""
    load = recent[-1][1]
    certain = load * max(0.0, 1 - _ROOTS / math.sqrt(requests)) if requests else load
    whole = recent[-1][0] - recent[0][0] >= policy.mean_s - _ROUNDING
    return max(certain, _mean(recent)) if whole else certain


def _mean(recent: tuple[tuple[float, float], ...]) -> float:
    return sum(load for _, load in recent) / len(recent)


def _unknown(policy: Policy, seen: Observation) -> list[Replica]:
    return [replica for replica in seen.replicas if replica.unknown(seen.now, policy.stale_after_s)]


def _idle(policy: Policy, seen: Observation, memory: Memory) -> bool:
    """Known for certain: by every gateway, and by the replicas. Without a gateway nobody could wake the service; before a replica is ready
    nobody knows that one can be."""
    demand = seen.demand
    if not any(replica.ready for replica in seen.replicas):
        return False
    if demand is None or not demand.complete or not demand.gateways or memory.idle_since is None:
        return False
    quiet = demand.quiet_s is None or demand.quiet_s >= policy.zero_after_s
    return quiet and seen.now - memory.idle_since >= policy.zero_after_s


# ---- what is remembered --------------------------------------------------------------------------------------------------------------


def _remember(policy: Policy, seen: Observation, memory: Memory) -> tuple[Memory, float]:
    """Memory after this observation, and the load of now: of what is known, so never more than there is."""
    samples = {r.name: s for r in seen.replicas if (s := r.fresh(seen.now, policy.stale_after_s)) is not None}
    learnt = memory.capacity.learn(seen.now, samples.values())
    capacity = learnt.of(policy.max_batch)
    held = seen.demand.held if seen.demand else 0
    sent = seen.demand.running if seen.demand else 0
    load = sum(replica_load(policy, sample, capacity) for sample in samples.values()) + request_load(policy, held, capacity)
    # What replicas cannot tell, gateways may know; what waits at replicas counts as in a sample.
    able = 2 * capacity * sum(replica.ready for replica in seen.replicas)
    load = max(load, request_load(policy, held + min(sent, able), capacity))
    requests = max(sum(s.running + s.waiting for s in samples.values()), sent) + held
    gap = bool(_unknown(policy, seen))
    asked = held or sent or any(s.running or s.waiting for s in samples.values())
    served = {name: sample.served for name, sample in samples.items()}
    # A replica that is not known now keeps its count: if it still stands there later, nobody asked in between.
    kept = {r.name: memory.served[r.name] for r in seen.replicas if r.name in memory.served and r.name not in served}
    moved = any(memory.served.get(name) != count for name, count in served.items())
    idle_since = None if asked else seen.now if moved or memory.idle_since is None else memory.idle_since
    known_since = None if gap else seen.now if memory.known_since is None else memory.known_since
    recent = _window(memory.recent, seen.now, load, policy.mean_s, keep_one_older=True)
    certain = _certain(policy, recent, requests)
    peak = max(certain, _mean(recent))
    result = replace(
        memory,
        recent=recent,
        certain=certain,
        peaks=_add_peak(policy, seen.now, memory.peaks, peak),
        known_since=known_since,
        capacity=learnt,
        idle_since=idle_since,
        served={**kept, **served},
    )
    return result, load


def _add_peak(policy: Policy, now: float, peaks: tuple[tuple[float, float], ...], load: float) -> tuple[tuple[float, float], ...]:
    return _window(tuple(peak for peak in peaks if peak[1] > load), now, load, policy.down_after_s)


def _window(
    entries: tuple[tuple[float, float], ...], now: float, load: float, length_s: float, *, keep_one_older: bool = False
) -> tuple[tuple[float, float], ...]:
    """The entries of the last `length_s` and this one; with `keep_one_older` also the last before them, so that they span the window."""
    entries = (*entries, (now, load))
    inside = [index for index, (when, _) in enumerate(entries) if now - when < length_s]
    first = inside[0] if inside else len(entries) - 1
    return entries[max(0, first - 1) if keep_one_older else first :]


def _inputs(policy: Policy, seen: Observation, memory: Memory, load: float) -> str:
    samples = [s for r in seen.replicas if (s := r.fresh(seen.now, policy.stale_after_s)) is not None]
    ready = sum(replica.ready for replica in seen.replicas)
    capacity = memory.capacity.of(policy.max_batch)
    parts = [
        f"load {load:.2f} ({memory.certain:.2f} certain) of {policy.metric}",
        f"{meant(policy, capacity):.0f} of {capacity:.0f} requests a replica",
        f"starts in {policy.startup_s:.0f} s",
        f"running {sum(s.running for s in samples)}",
        f"waiting {sum(s.waiting for s in samples)}",
        f"{ready} of {seen.current} ready",
    ]
    if unknown := _unknown(policy, seen):
        parts.append(f"{len(unknown)} unknown")
    if seen.demand is not None:
        parts.append(f"held {seen.demand.held}")
    if memory.peaks and memory.peaks[0][1] > memory.certain + _ROUNDING:
        parts.append(f"peak {memory.peaks[0][1]:.2f}")
    return ", ".join(parts)
