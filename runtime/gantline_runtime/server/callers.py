"""Who asks: the API key that a request came with, as far as the engine's queue cares. Set once a request, by `access.py`.

A gateway, which knew the key, tells it with a header:

    X-Gantline-Caller: team-a/alice;weight=2.0;priority=-5
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["ANYONE", "BEST_PRIORITY", "HEADER", "Caller", "current_caller", "read_caller"]

BEST_PRIORITY = -10
"""The lower a priority's number, the earlier a request runs."""
HEADER = "x-gantline-caller"

_CALLER = re.compile(r"([A-Za-z0-9._/-]{0,320});weight=(\d{1,4}(?:\.\d{1,4})?);priority=(-?\d{1,2})")


@dataclass(frozen=True)
class Caller:
    name: str = ""
    """The API key's name, which logs and metrics may show; empty where the server asks for no key."""
    weight: float = 1.0
    """Share of the engine beside others that wait."""
    best_priority: int = BEST_PRIORITY
    """The lowest `priority` that its requests may have."""
    internal: bool = False
    """Whether it may read what concerns all callers, such as which prompts the cache holds."""

    def to_header(self) -> str:
        """For another server, which reads it with `read_caller`."""
        return f"{self.name};weight={self.weight};priority={self.best_priority}"


ANYONE = Caller(internal=True)

current_caller: ContextVar[Caller] = ContextVar("caller", default=ANYONE)


def read_caller(header: str) -> Caller | None:
    """Whom a gateway names; None for what is no such header."""
    match = _CALLER.fullmatch(header)
    if match is None or not float(match[2]) or abs(int(match[3])) > -BEST_PRIORITY:
        return None
    return Caller(match[1], float(match[2]), int(match[3]))
