"""What is known of one service at one moment. Times are seconds of any one monotonic clock, passed in."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Demand", "Observation", "Replica", "Sample"]


@dataclass(frozen=True)
class Sample:
    """What one replica's /metrics said at the time `at`."""

    at: float
    running: int
    """Requests that the engine computes."""
    waiting: int
    """Requests in the engine's queue."""
    cache_usage: float
    """Share of the KV cache that requests hold, 0 to 1."""
    served: float
    """Prompt tokens since the server's start: it grows with every request, also one that came and went between two samples."""

    @property
    def full(self) -> bool:
        """Whether it runs all that it can. A few wait at any moment, for the step that is being computed to end."""
        return self.running > 0 and self.waiting > max(4, self.running / 8)


@dataclass(frozen=True)
class Replica:
    """One pod; `sample` is the last that it gave, however old, None where it never gave any."""

    name: str
    ready: bool
    sample: Sample | None = None

    def fresh(self, now: float, stale_after_s: float) -> Sample | None:
        return self.sample if self.sample is not None and now - self.sample.at <= stale_after_s else None

    def unknown(self, now: float, stale_after_s: float) -> bool:
        """One that answers clients, or did, and whose load nobody knows. One that is only starting has none."""
        return (self.ready or self.sample is not None) and self.fresh(now, stale_after_s) is None


@dataclass(frozen=True)
class Demand:
    """What the gateways know of a service, added up."""

    held: int = 0
    """Requests that wait for a replica to start."""
    running: int = 0
    quiet_s: float | None = None
    """Since the last request through any gateway; None where none has been seen."""
    complete: bool = True
    """Whether every gateway answered: then what is absent is not there, else it is not known."""
    gateways: int = 1
    """How many there are."""


@dataclass(frozen=True)
class Observation:
    now: float
    current: int
    """spec.replicas: what was asked for last, by whomever."""
    replicas: tuple[Replica, ...] = ()
    demand: Demand | None = None
    """None where gateways were not asked."""
    rolling: bool = False
    """Whether pods of two revisions are about."""
