"""Who asks: the API key that a request came with, as far as the engine's queue cares. Set once a request, by `access.py`."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["ANYONE", "BEST_PRIORITY", "Caller", "current_caller"]

BEST_PRIORITY = -10
"""The lower a priority's number, the earlier a request runs."""


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


ANYONE = Caller(internal=True)

current_caller: ContextVar[Caller] = ContextVar("caller", default=ANYONE)
