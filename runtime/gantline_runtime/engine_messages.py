"""What crosses the process boundary beside requests and their tokens (`messages.py`): how the engine starts, fares and fails.

    API -> engine   EngineRequest, AbortRequest, Shutdown
    engine -> API   EngineProgress*, EngineReady, then StepOutputs, RequestRefused, EngineReport, PrefixChanges, EngineBusy; EngineFailed is
                    the last word

Encoded by msgspec as MessagePack. Imports no torch.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from gantline_runtime.messages import AbortRequest, EngineRequest, TokenOutput

__all__ = [
    "ApiMessage",
    "EngineBusy",
    "EngineFailed",
    "EngineMessage",
    "EngineProgress",
    "EngineReady",
    "EngineReport",
    "PrefixChanges",
    "RequestRefused",
    "Shutdown",
    "StepOutputs",
]


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """End the process now; what still runs is dropped."""


class EngineProgress(msgspec.Struct, tag="progress", frozen=True, kw_only=True):
    """How far the start has come. `total` 0: nobody knows. The unit is the phase's own (bytes for `weights`)."""

    phase: str
    done: int = 0
    total: int = 0


class EngineReady(msgspec.Struct, tag="ready", frozen=True, kw_only=True):
    session_len: int
    eos_token_ids: list[int]
    phases: dict[str, float]
    """Seconds that each phase of the start took."""


class EngineReport(msgspec.Struct, tag="report", frozen=True, kw_only=True):
    """The engine is alive between two steps, and this is its state. Numbers of tokens and events count from the start."""

    num_running: int = 0
    num_waiting: int = 0
    seconds_without_progress: float = 0.0
    """Work to do, and no step was launched or read for so long."""
    num_waiting_tokens: int = 0
    seconds_until_room: float = 0.0
    """When the next of those that wait for a place in the queue would find one."""
    cache_usage: float = 0.0
    """Share of the KV cache's blocks that requests hold, 0 to 1; blocks that are only kept for reuse are free."""
    num_cache_blocks: int = 0
    prefix_hit_rate: float = 0.0
    num_queried_tokens: int = 0
    num_cached_tokens: int = 0
    num_shared_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    step_times: dict[str, float] = {}
    """Seconds of the host in each part of all steps so far."""
    promised_bytes: dict[str, int] = {}
    """Memory of one device that the planner's formula (`sizing.py`) expects, by part: `weights`, `cache`."""
    reserved_bytes: dict[str, int] = {}
    """Memory of one device that was really taken, by part."""
    kernels: dict[str, int] = {}
    """Triton's kernels that were loaded so far, by where they came from (`compilation.loaded_kernels`)."""
    about: dict[str, str] = {}
    """`architecture`: the model's class; `implementation`: `gantline`, or `transformers`, for a `reason` that is empty otherwise."""


class PrefixChanges(msgspec.Struct, tag="prefixes", frozen=True, kw_only=True):
    """Which beginnings of prompts came into the cache and which went, by the hashes that requests came with (`EngineRequest.prefix_marks`).
    Every API process hears the same, with each report that finds a change."""

    epoch: str
    """Which start of the engine: another one has another cache."""
    number: int
    """Counts the changes of an epoch."""
    whole: bool = False
    """`added` is all that there is: an API process's first word of it."""
    added: list[int] = []
    removed: list[int] = []


class EngineBusy(msgspec.Struct, tag="busy", frozen=True):
    """The engine compiles a kernel: it may say nothing for so many seconds, and is not stuck. 0: it is back."""

    seconds: float


class StepOutputs(msgspec.Struct, tag="step", frozen=True):
    outputs: list[TokenOutput]


class RequestRefused(msgspec.Struct, tag="refused", frozen=True, kw_only=True):
    """The engine will not run a request; nothing else follows for it."""

    request_id: str
    code: Literal["queue_full", "invalid", "error"]
    message: str
    retry_after_s: float = 0.0
    """With `queue_full`: when to try again."""


class EngineFailed(msgspec.Struct, tag="failed", frozen=True, kw_only=True):
    """Fields of a `TerminationMessage`; the process ends."""

    reason: str
    message: str
    cure: str


ApiMessage = EngineRequest | AbortRequest | Shutdown
EngineMessage = EngineBusy | EngineProgress | EngineReady | EngineReport | PrefixChanges | StepOutputs | RequestRefused | EngineFailed
