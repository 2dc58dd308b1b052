"""A request while the engine has it: its tokens, how far it is computed, and the blocks it holds.

    waiting --admit--> running (prefilling, then decoding) --last token--> finished
       ^                  |
       +----preempted-----+      its blocks are given up; its tokens stay and are computed anew

Steps overlap, so a sequence is counted in two ways. What is *scheduled* runs ahead: `num_computed` and `num_sampled` include the
step in flight. What is *known* lags: `tokens` holds the prompt and the sampled tokens that have reached the host.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Sequence as Seq
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gantline_runtime.messages import EngineRequest, FinishReason, SamplingParams

__all__ = ["QueueFull", "RequestRejected", "Sequence"]


class QueueFull(Exception):
    """As many requests wait as may; the caller should answer 429 and have the client try again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestRejected(ValueError):
    """A request that can never run: too long, empty, a token outside of the vocabulary, or an identifier in use."""


class Matcher(Protocol):
    """What the scheduler needs of `gantline_runtime.grammar.matching.GrammarMatcher`."""

    def push(self, token: int) -> None:
        """The answer goes on with `token`."""
        ...


class Sequence:
    """One request's state. Owned by the scheduler; `blocks` and the digests are the cache manager's to write."""

    __slots__ = (
        "admitted_at",
        "arrival",
        "arrived_at",
        "blocks",
        "digests",
        "finish_reason",
        "grammar",
        "in_flight",
        "marks",
        "matcher",
        "max_new_tokens",
        "min_new_tokens",
        "num_cached_tokens",
        "num_computed",
        "num_prompt_logprobs",
        "num_published",
        "num_read",
        "num_sampled",
        "pooled",
        "pooling",
        "predicted_tokens",
        "preempted",
        "priority",
        "prompt_len",
        "read_end",
        "request_id",
        "sampling",
        "seed",
        "slot",
        "stop_ids",
        "tenant",
        "tokens",
        "weight",
    )

    def __init__(
        self, request: EngineRequest, *, arrival: int, session_len: int, eos_token_ids: Seq[int], vocab_size: int = 1 << 31
    ) -> None:
        sampling = request.sampling
        self.request_id = request.request_id
        self.sampling: SamplingParams = sampling
        self.tenant, self.weight, self.priority = request.tenant, request.weight, request.priority
        self.predicted_tokens = 0
        """What it is expected to take of the cache at its end; set when it is queued."""
        self.arrival = arrival
        self.arrived_at = time.monotonic()
        self.admitted_at: float | None = None
        """When it was first scheduled; `time.monotonic`, as `arrived_at`."""
        self.tokens: array[int] = array("i", request.prompt_ids)
        self.prompt_len = len(request.prompt_ids)
        self.marks = request.prefix_marks
        self.max_new_tokens = min(sampling.max_new_tokens, session_len - self.prompt_len)
        self.min_new_tokens = sampling.min_new_tokens
        stops = (*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids))
        self.stop_ids = frozenset(token for token in stops if 0 <= token < vocab_size)
        self.grammar = request.grammar
        self.matcher: Matcher | None = None
        """How far the answer has come in its grammar; None without one, and until it is compiled."""
        self.seed = random.getrandbits(64) if sampling.seed is None else sampling.seed & (1 << 64) - 1
        self.slot = -1
        """Row of the device's per-request state (block table, last token, sampling parameters); -1 while not running."""
        self.blocks: list[int] = []
        self.digests: list[bytes] = []
        """Chained digest of each full block of `tokens`, computed on demand."""
        self.num_published = 0
        """Leading blocks that the prefix cache already knows."""
        self.num_computed = 0
        """Tokens whose keys and values are in the cache, or will be once the step in flight has run."""
        self.num_sampled = 0
        """Tokens sampled so far, with the one in flight."""
        self.num_cached_tokens = 0
        self.num_prompt_logprobs = request.num_prompt_logprobs
        self.pooling = request.pooling
        self.num_read, self.read_end = self._rows_to_read()
        """The prompt's rows that are read beside sampling end before `read_end`; those before `num_read` are read (or will be once the step
        in flight has run) or are not wanted. Reading goes on where it was when a sequence is preempted."""
        self.pooled: NDArray[np.float64] | None = None
        """Sum of the hidden states that were read."""
        self.in_flight = 0
        """Steps in flight that write to `blocks`."""
        self.preempted = False
        self.finish_reason: FinishReason | None = None

    def _rows_to_read(self) -> tuple[int, int]:
        """A token's log-probability is read from the row before it."""
        if self.pooling is not None:
            return (self.prompt_len - 1 if self.pooling == "last" else 0), self.prompt_len
        return (0, self.prompt_len - 1) if self.num_prompt_logprobs is not None else (0, 0)

    @property
    def num_reusable(self) -> int:
        """Leading tokens that need not be computed if the cache knows them: one must be, and all whose rows are still to be read."""
        limit = len(self.tokens) - 1
        return min(limit, self.num_read) if self.num_read < self.read_end else limit

    @property
    def ready(self) -> bool:
        """Whether it can be scheduled: its grammar, if it has one, is compiled."""
        return self.matcher is not None or not self.grammar

    @property
    def length(self) -> int:
        """Tokens that exist, on the host or still on the device."""
        return self.prompt_len + self.num_sampled

    @property
    def num_generated(self) -> int:
        """Sampled tokens that have reached the host."""
        return len(self.tokens) - self.prompt_len

    def __repr__(self) -> str:
        state: dict[str, Any] = {"length": self.length, "computed": self.num_computed, "slot": self.slot, "blocks": len(self.blocks)}
        return f"Sequence({self.request_id!r}, {', '.join(f'{k}={v}' for k, v in state.items())})"
