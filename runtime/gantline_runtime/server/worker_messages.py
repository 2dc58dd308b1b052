"""What the first API process says to the others (`followers.py`, `follower.py`), and what they answer.

    first -> other   Order: EngineProgress*, Serve, then Drain, CutOff or Die, and Stop at last
    other -> first   WorkerReport, at once after each order, and now and then

Encoded by msgspec as MessagePack.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from gantline_runtime.engine_messages import EngineProgress

__all__ = ["CutOff", "Die", "Drain", "FollowerSettings", "Order", "Serve", "Stop", "WorkerReport"]


class FollowerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a further API process needs to know; the one argument of its command line, as JSON."""

    number: int
    """1 and up; the first API process is 0."""
    engine_endpoint: str
    control_endpoint: str
    parent_pid: int
    model_dir: str
    engine_config: dict[str, object]
    server_config: dict[str, object]
    """With the port that the first process got."""
    version: str
    log_format: Literal["json", "text"]


class Serve(msgspec.Struct, tag="serve", frozen=True):
    """The server is ready. `startup`: seconds of each phase of its start, for /metrics."""

    startup: dict[str, float]


class Drain(msgspec.Struct, tag="drain", frozen=True):
    """Stop being ready, and take no requests any more after `delay_s`."""

    delay_s: float


class CutOff(msgspec.Struct, tag="cut_off", frozen=True):
    """End what still runs: the drain time is over."""


class Die(msgspec.Struct, tag="die", frozen=True):
    """The engine is gone. Fields of a `TerminationMessage`."""

    reason: str
    message: str


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """End the process."""


class Order(msgspec.Struct, frozen=True):
    number: int
    """Counts up; reports say which was the last that was followed."""
    what: EngineProgress | Serve | Drain | CutOff | Die | Stop


class WorkerReport(msgspec.Struct, frozen=True):
    order: int
    """Number of the last order that was followed, 0 for none: then the process has just come up."""
    num_admitted: int
    loaded: bool
    """It could serve."""
