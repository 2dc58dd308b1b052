"""Sampling parameters: one row of a table per running request, gathered into a batch for each step.

Nothing of this is needed, and nothing is made, while every request of a step is greedy and plain.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gantline_runtime.request import Sequence
from gantline_runtime.sampling.edits import Edits, EditTable
from gantline_runtime.sampling.random import uniforms
from gantline_runtime.scheduler import Step

__all__ = ["MAX_COUNT", "SamplingBatch", "SamplingTable", "TokenMask"]

_RANDOM, _FILTERED, _PENALIZED, _EDITED, _LOGPROBS = 1, 2, 4, 8, 16
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_LEAST_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken, as with 0: logits over a smaller one leave float32, and only ties would be drawn anyway."""

MAX_COUNT = 32_767
"""A token's occurrences are counted in 16 bits, and no further: with a frequency penalty of 0.01 it has lost 328 by then."""

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class TokenMask:
    """What grammars allow: in row `rows[i]` the tokens whose bit in `allowed[i]` is 1.

    `rows` int64 [M]; `allowed` int32 [M, ceil(vocabulary / 32)] on the host, pinned where that speeds up its copy; not written to before
    the step's tokens have been read.
    """

    rows: Integers
    allowed: torch.Tensor


@dataclass(frozen=True)
class FreshPenalties:
    """Requests whose token counts begin anew on the device: their slots, and pairs of slot and token, each once, of their prompts and of
    their outputs so far, with how often these have come."""

    slots: Integers
    prompt_slots: Integers
    prompt_tokens: Integers
    output_slots: Integers
    output_tokens: Integers
    output_counts: Integers
    """At most MAX_COUNT."""


@dataclass(frozen=True)
class SamplingBatch:
    """Parameters of the S rows that a step samples. An absent part means that no row needs it; within a part, other rows are neutral."""

    temperature: Floats | None = None
    """0 for greedy rows; None if all are."""
    uniforms: Floats | None = None
    """One random number in [0, 1) per row, from the request's seed and the token's position alone."""
    top_k: Integers | None = None
    """int64; 0 for no limit. Present with top_p and min_p."""
    top_p: Floats | None = None
    min_p: Floats | None = None
    repetition_penalty: Floats | None = None
    """Present with the other penalties."""
    presence_penalty: Floats | None = None
    frequency_penalty: Floats | None = None
    fresh_penalties: FreshPenalties | None = None
    edits: Edits | None = None
    mask: TokenMask | None = None
    logprob_rows: Integers | None = None
    """Rows whose log-probabilities are wanted."""
    logprob_counts: tuple[int, ...] = ()
    """How many of the likeliest tokens each of them wants."""

    @property
    def num_logprobs(self) -> int:
        return max(self.logprob_counts, default=0)


class SamplingTable:
    def __init__(self, max_slots: int) -> None:
        self._flags = np.zeros(max_slots, dtype=np.uint8)
        self._floats = {name: np.zeros(max_slots, dtype=np.float32) for name in _FLOATS}
        self._top_k = np.zeros(max_slots, dtype=np.int64)
        self._seeds = np.zeros(max_slots, dtype=np.uint64)
        self._edits = EditTable(max_slots)

    def set(self, sequence: Sequence) -> None:
        """Take over the parameters of a sequence that samples its first token in this slot."""
        params, slot = sequence.sampling, sequence.slot
        for name in _FLOATS:
            self._floats[name][slot] = getattr(params, name)
        self._top_k[slot] = params.top_k
        self._seeds[slot] = sequence.seed
        random = params.temperature >= _LEAST_TEMPERATURE
        if not random:
            self._floats["temperature"][slot] = 0.0
        filtered = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        penalized = params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        flags = 0
        if random:
            flags |= _RANDOM | (_FILTERED if filtered else 0)
        if penalized:
            flags |= _PENALIZED
        if self._edits.set(sequence):
            flags |= _EDITED
        if params.num_logprobs is not None:
            flags |= _LOGPROBS
        self._flags[slot] = flags

    def batch(self, step: Step) -> SamplingBatch | None:
        """The parameters for a step's samples, or None if plain greedy will do."""
        for sequence in step.samples[step.num_decodes :]:
            self.set(sequence)
        slots = np.array([s.slot for s in step.samples], dtype=np.int64)
        flags = self._flags[slots]
        present = int(np.bitwise_or.reduce(flags)) if len(flags) else 0
        if not present:
            return None
        parts: dict[str, Any] = {}
        if present & _RANDOM:
            parts |= self._random_part(step, slots, filtered=bool(present & _FILTERED))
        if present & _PENALIZED:
            parts |= self._penalty_part(step, slots, flags)
        if present & _EDITED:
            parts["edits"] = self._edits.batch(step.samples, np.flatnonzero(flags & _EDITED), step.num_decodes)
        if present & _LOGPROBS:
            rows = np.flatnonzero(flags & _LOGPROBS)
            parts["logprob_rows"] = rows
            parts["logprob_counts"] = tuple(step.samples[i].sampling.num_logprobs or 0 for i in rows)
        return SamplingBatch(**parts)

    def _random_part(self, step: Step, slots: Integers, *, filtered: bool) -> dict[str, Any]:
        positions = np.array([s.length - 1 for s in step.samples], dtype=np.uint64)
        part: dict[str, Any] = {
            "temperature": self._floats["temperature"][slots],
            "uniforms": uniforms(self._seeds[slots], positions),
        }
        if filtered:
            part["top_k"] = self._top_k[slots]
            part["top_p"] = self._floats["top_p"][slots]
            part["min_p"] = self._floats["min_p"][slots]
        return part

    def _penalty_part(self, step: Step, slots: Integers, flags: NDArray[np.uint8]) -> dict[str, Any]:
        part: dict[str, Any] = {
            "repetition_penalty": self._floats["repetition_penalty"][slots],
            "presence_penalty": self._floats["presence_penalty"][slots],
            "frequency_penalty": self._floats["frequency_penalty"][slots],
        }
        fresh = [s for i, s in enumerate(step.samples) if i >= step.num_decodes and flags[i] & _PENALIZED]
        if fresh:
            part["fresh_penalties"] = _fresh(fresh)
        return part


def _fresh(sequences: list[Sequence]) -> FreshPenalties:
    slots = np.array([s.slot for s in sequences], dtype=np.int64)
    tokens = [np.array(s.tokens, dtype=np.int64) for s in sequences]
    prompts = [np.unique(own[: s.prompt_len]) for s, own in zip(sequences, tokens, strict=True)]
    outputs, counts = zip(
        *(np.unique(own[s.prompt_len :], return_counts=True) for s, own in zip(sequences, tokens, strict=True)), strict=True
    )
    of_prompts, of_outputs = _repeat(slots, prompts), _repeat(slots, outputs)
    most = np.minimum(np.concatenate(counts), MAX_COUNT)
    return FreshPenalties(slots, of_prompts, np.concatenate(prompts), of_outputs, np.concatenate(outputs), most)


def _repeat(slots: Integers, parts: Iterable[Integers]) -> Integers:
    return np.repeat(slots, [len(part) for part in parts])
