"""What crosses the boundary between the API process and the engine: plain structs, encoded by msgspec.

The API process owns text (templates, tokenizing, stop strings, detokenizing); the engine owns tokens. A request's life:
`EngineRequest` in, then any number of `TokenOutput` back, the last of which has a `finish_reason`; `AbortRequest` ends it early.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = [
    "AbortRequest",
    "EngineRequest",
    "ErrorCode",
    "FinishReason",
    "Pooling",
    "PromptLogprobs",
    "SamplingParams",
    "TokenLogprobs",
    "TokenOutput",
]

FinishReason = Literal["stop", "length", "abort", "error"]
Pooling = Literal["last", "mean"]

ErrorCode = Literal["error", "invalid_grammar"]
"""Whose fault an error is: `error` ours, `invalid_grammar` the request's."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen. Ranges are checked where they enter (the server, the command line); the engine trusts them."""

    max_new_tokens: int = 512
    """Most tokens to generate; the engine cuts it to what `session_len` leaves. 0: the request only reads its prompt."""
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Tokens that may not be generated one right after the other."""
    min_new_tokens: int = 0
    """End-of-sequence and stop tokens are masked until so many tokens were generated."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    """Beside the model's own end-of-sequence tokens."""
    seed: int | None = None
    """A request's random numbers depend on its seed and the token's position alone."""
    num_logprobs: int | None = None
    """None: none. n >= 0: the chosen token's log-probability and those of the n likeliest tokens (at most 20)."""


class EngineRequest(msgspec.Struct, tag="request", frozen=True, kw_only=True):
    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams = SamplingParams()
    num_prompt_logprobs: int | None = None
    """None: none. n >= 0: the log-probability of each prompt token after the first, and those of the n likeliest tokens at its place."""
    pooling: Pooling | None = None
    """The final hidden state of the prompt's last token, or the mean over its tokens, is wanted. Not together with other output."""
    grammar: str = ""
    """What the answer must match, as a structural tag of xgrammar in JSON; empty: anything. Where it ends, the answer ends, whatever
    `ignore_eos` says; `min_new_tokens` must be 0 with it."""
    tenant: str = ""
    """Whose it is (the name of an API key): tenants that wait take turns, in proportion to their `weight`."""
    weight: float = 1.0
    priority: int = 0
    """The lower, the earlier it runs, before anyone's turn."""
    prefix_marks: list[tuple[int, int]] = []
    """(tokens, hash) of beginnings of the prompt, whose presence in the cache is told by `PrefixChanges` (`prompt_prefixes.py`)."""


class AbortRequest(msgspec.Struct, tag="abort", frozen=True):
    request_id: str
    num_tokens: int | None = None
    """Where its answer has ended, by a stop string: the tokens that were sampled after so many do not count. None: the client left."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural) at one generated position, of the distribution before temperature and filters."""

    chosen: float
    top_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural) of consecutive prompt tokens, the first of which stands at position `start` (never 0)."""

    start: int
    chosen: list[float]
    top_ids: list[list[int]]
    """For each token the likeliest at its place; as many as the request asked for."""
    top_logprobs: list[list[float]]
    ranks: list[int]
    """Each token's place among all of the vocabulary, 1 for the likeliest."""


class TokenOutput(msgspec.Struct, tag="tokens", frozen=True, kw_only=True):
    """New tokens of one request since its last output, or what was read of its prompt."""

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    queue_seconds: float | None = None
    """In a request's first output: how long it waited for its first step."""
    prompt_logprobs: PromptLogprobs | None = None
    """Of one chunk of the prompt; chunks come in order, before the first token."""
    embedding: bytes = b""
    """In the only output of a request with `pooling`: float32, little-endian."""
    error: str = ""
    """Cause, with finish_reason `error`."""
    error_code: ErrorCode = "error"
