"""Requests that wait because their service has no replica: at zero, being swapped, or all starting.

For 15 s nothing is said, so that an error can still have its status; from then on a stream is kept alive with comments. At the bound
a stream ends with an error event, everything else gets a 503 whose Retry-After comes from how long a start takes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from gantline_runtime.server.api_error import ApiError

from gantline_gateway.answer import Answer
from gantline_gateway.catalog import Service
from gantline_gateway.directory import Directory
from gantline_gateway.traffic import Traffic

__all__ = ["KEEP_ALIVE_S", "HoldLimits", "Ticket", "WaitingRoom", "retry_after_s"]

KEEP_ALIVE_S = 10.0
"""Between comments: below what proxies allow a silent connection."""
_SOONEST_S = 5
"""No client is asked to come back earlier: a start that is overdue will not be done in the next second."""


@dataclass(frozen=True)
class HoldLimits:
    """Of one service in one gateway. `silence_s` and `timeout_s` are seconds of waiting."""

    silence_s: float = 15.0
    timeout_s: float = 300.0
    max_requests: int = 256
    max_bytes: int = 64 << 20


def retry_after_s(startup_s: float, waited_s: float) -> int:
    """When to try again a service whose start was asked for `waited_s` ago."""
    return max(_SOONEST_S, math.ceil(startup_s - waited_s))


@dataclass
class Ticket:
    """A request's place in the order of those that wait; it keeps it also when it has to wait again."""

    number: int
    size: int
    """Bytes of its body."""
    waited_s: float = 0.0
    """How long it has waited, all in all; not what a replica took that failed in between."""
    comment_at: float | None = None
    """When the next comment is due, once it has waited."""


@dataclass
class WaitingRoom:
    directory: Directory
    traffic: Traffic
    limits: HoldLimits = field(default_factory=HoldLimits)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _bytes: dict[str, int] = field(default_factory=dict)

    def ticket(self, size: int) -> Ticket:
        return Ticket(next(self._numbers), size)

    async def wait(
        self, key: str, ticket: Ticket, answer: Answer, *, stream: bool, ready: Callable[[Service], bool], pause_s: float = math.inf
    ) -> Service:
        """The service `key` as soon as it is `ready`, or after `pause_s` in any case. Raises ApiError if waiting is refused, of no use, or
        over; then comments may have been sent to a `stream`."""
        service = self._find(key)
        if ready(service):
            return service
        self._admit(service, ticket)
        clock, held = self.traffic.clock, self.traffic.of(key).held
        entered_at = clock()
        since = held[ticket.number] = entered_at - ticket.waited_s
        give_up_at = since + self.limits.timeout_s
        self._bytes[key] = self._bytes.get(key, 0) + ticket.size
        if ticket.comment_at is None:
            ticket.comment_at = since + self.limits.silence_s if stream else math.inf
        try:
            while True:
                now = clock()
                if now >= give_up_at:
                    raise self._too_late(service, now - since, now - min(held.values()))
                if now >= ticket.comment_at:
                    await answer.keep_alive(f"waiting for a replica of {service.model}, {now - since:.0f} s so far")
                    ticket.comment_at = now + KEEP_ALIVE_S
                until = min(ticket.comment_at, give_up_at, entered_at + pause_s)
                await self.directory.wait_change(ticket.number, max(0.001, until - clock()))
                service = self._find(key)
                if ready(service) or clock() >= entered_at + pause_s:
                    return service
        finally:
            ticket.waited_s += clock() - entered_at
            del held[ticket.number]
            self._bytes[key] -= ticket.size

    def _find(self, key: str) -> Service:
        """Raises ApiError where no replica will come."""
        service = self.directory.catalog.find(key)
        if service is None:
            raise ApiError(404, f"The service {key!r} has been deleted.", code="model_not_found", param="model")
        if service.suspended:
            raise ApiError(503, f"The service {key!r} is suspended: set spec.suspend to false to have it answer.", code="suspended")
        if service.wanted == 0 and not service.usable and not service.wakes:
            cure = "scale it up, or give it spec.scaling with min: 0."
            message = f"The service {key!r} has been scaled to zero, and nothing wakes it: {cure}"
            raise ApiError(503, message, code="scaled_to_zero")
        return service

    def _admit(self, service: Service, ticket: Ticket) -> None:
        held, size = self.traffic.of(service.key).held, self._bytes.get(service.key, 0)
        if len(held) < self.limits.max_requests and size + ticket.size <= self.limits.max_bytes:
            return
        waited_s = self.traffic.clock() - min(held.values(), default=self.traffic.clock())
        again_s = retry_after_s(service.startup_s, waited_s)
        message = f"{service.key!r} has no replica yet, and {len(held)} requests wait for one; more may not. Try again in {again_s} s."
        raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(again_s)})

    def _too_late(self, service: Service, waited_s: float, asked_s: float) -> ApiError:
        """`asked_s` is how long the service has been waited for, perhaps by others first."""
        again_s = retry_after_s(service.startup_s, asked_s)
        state = f" ({service.trouble})" if service.trouble else ""
        message = f"No replica of {service.key!r} became ready within {waited_s:.0f} s{state}. Try again in {again_s} s."
        return ApiError(503, message, code="no_replica", headers={"Retry-After": str(again_s)})
