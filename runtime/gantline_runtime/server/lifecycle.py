"""The states of a server, and what each answers to whom.

loading ──> warming ──> ready ──> draining ──> dead
   │           │          │                      ^
   └───────────┴──────────┴──────────────────────┘      (the engine failed, or SIGTERM came before ready)

state      /health           /ready   new requests
loading    200 (progress)    503      503 not_ready
warming    200 (progress)    503      503 not_ready
ready      200, 503 if the   200      yes
           engine is stuck
draining   as ready          503      yes until `drain_delay` has passed, then 503 draining
dead       503               503      503
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

__all__ = ["Lifecycle", "State"]


class State(StrEnum):
    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


_NEXT = {
    State.LOADING: {State.WARMING, State.READY, State.DRAINING, State.DEAD},
    State.WARMING: {State.READY, State.DRAINING, State.DEAD},
    State.READY: {State.DRAINING, State.DEAD},
    State.DRAINING: {State.DEAD},
    State.DEAD: set(),
}


class Lifecycle:
    """Holds the state; `clock` is monotonic, in seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, began_at: float | None = None) -> None:
        """`began_at`: when the start began, by `clock` (default: now)."""
        self._clock = clock
        self.began_at = clock() if began_at is None else began_at
        self.state = State.LOADING
        self.phase = "start"
        self.done = 0
        self.total = 0
        self._takes_requests_until = float("inf")

    def enter(self, state: State) -> None:
        """Go on to `state`. Asking for the present state changes nothing."""
        if state is not self.state:
            assert state in _NEXT[self.state], f"no way from {self.state} to {state}"
            self.state = state

    def show_progress(self, phase: str, done: int = 0, total: int = 0) -> None:
        """What the start is busy with; any phase named `warm...` is the warming state."""
        self.phase, self.done, self.total = phase, done, total
        if phase.startswith("warm") and self.state is State.LOADING:
            self.enter(State.WARMING)

    def drain(self, delay_s: float) -> None:
        """Stop being ready now, and stop taking requests in `delay_s`."""
        was_ready = self.state is State.READY
        self._takes_requests_until = self._clock() + delay_s if was_ready else 0.0
        self.enter(State.DRAINING)

    @property
    def is_ready(self) -> bool:
        return self.state is State.READY

    @property
    def takes_requests(self) -> bool:
        return self.is_ready or (self.state is State.DRAINING and self._clock() < self._takes_requests_until)

    @property
    def progress(self) -> float | None:
        """Share of the present phase that is done, 0 to 1; None where nobody knows."""
        return min(1.0, self.done / self.total) if self.total else None

    def describe(self) -> dict[str, object]:
        """Body of `/health` and `/ready`."""
        body: dict[str, object] = {"state": self.state.value}
        if self.state in (State.LOADING, State.WARMING):
            body.update(phase=self.phase, progress=self.progress, seconds=round(self._clock() - self.began_at, 1))
        return body
