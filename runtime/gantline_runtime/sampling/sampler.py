"""Choosing tokens on the device. Nothing here waits for the device; what the host wants is copied out by the caller.

Order: log-probabilities of the untouched logits; penalties; edits (bias, forbidden tokens); what grammars forbid; temperature, top-k,
top-p, min-p and the draw, which the kernels' `sample` does from one uniform number a row, so that a request's tokens do not depend on its
neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gantline_kernels import api
from numpy.typing import NDArray
from torch.nn.functional import pad

from gantline_runtime import sizing
from gantline_runtime.sampling.batch import MAX_COUNT, SamplingBatch, TokenMask
from gantline_runtime.sampling.edits import ALWAYS, ON_DEVICE, Edits, FreshEdits

__all__ = ["SampledTokens", "Sampler"]

_EDIT_STEP = 256
"""Columns by which the changes kept of each request grow."""


@dataclass(frozen=True)
class SampledTokens:
    """On the device: `tokens` int64 [S]; where asked for, of `logprob_rows`: chosen [R], top ids and log-probabilities [R, n]."""

    tokens: torch.Tensor
    chosen_logprobs: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


class Sampler:
    """Keeps, for requests with penalties, how often each token has occurred, and for others what they change in logits; the memory is taken
    when the first such request comes."""

    def __init__(self, *, max_slots: int, vocab_size: int, device: torch.device, backend: str) -> None:
        self._max_slots = max_slots
        self._vocab_size = vocab_size
        self._device = device
        self._backend = backend
        self._output_counts: torch.Tensor | None = None
        self._in_prompt: torch.Tensor | None = None
        self._edits = torch.zeros((max_slots, 3, 0), dtype=torch.int32, device=device)
        """Rows of `FreshEdits.columns`, by slot."""

    @staticmethod
    def state_bytes(max_slots: int, vocab_size: int) -> int:
        """What penalties and changes of logits take on the device once requests use them."""
        return max_slots * (vocab_size * (2 + 1) + sizing.EDIT_BYTES)

    def __call__(self, logits: torch.Tensor, batch: SamplingBatch | None, slots: torch.Tensor, last_tokens: torch.Tensor) -> SampledTokens:
        """`logits` [S, vocabulary] in any floating type; `slots` int64 [S], each row's place in the per-request state; `last_tokens` int64
        [slots], the token that each request got last."""
        if batch is None:
            return SampledTokens(api.argmax(logits, backend=self._backend))
        edited = logits
        if batch.repetition_penalty is not None:
            edited = self._penalize(logits.float(), batch, slots)
        if batch.edits is not None:
            edited = edited.to(torch.float32, copy=edited is logits, memory_format=torch.contiguous_format)
            self._edit(edited, batch.edits, slots, last_tokens)
        if batch.mask is not None:
            if edited is logits and batch.logprob_rows is not None:
                edited = logits.clone()
            self._forbid(edited, batch.mask)
        tokens = self._choose(edited, batch)
        if batch.repetition_penalty is not None:
            self._count(slots, tokens)
        if batch.logprob_rows is None:
            return SampledTokens(tokens)
        return self._with_logprobs(logits, tokens, self._upload(batch.logprob_rows), batch.num_logprobs)

    def _choose(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        if batch.temperature is None or batch.uniforms is None:
            return api.argmax(logits, backend=self._backend)
        temperature, uniforms, *limits = self._upload_columns(batch.temperature, batch.uniforms, batch.top_k, batch.top_p, batch.min_p)
        top_k, top_p, min_p = limits or (None, None, None)
        top_k = None if top_k is None else top_k.int()
        return api.sample(logits, uniforms, temperature, top_k, top_p, min_p, backend=self._backend)

    def _forbid(self, logits: torch.Tensor, mask: TokenMask) -> None:
        allowed = mask.allowed if self._device.type == "cpu" else mask.allowed.to(self._device, non_blocking=True)
        api.mask_tokens(logits, self._upload(mask.rows), allowed, backend=self._backend)

    def _penalize(self, logits: torch.Tensor, batch: SamplingBatch, slots: torch.Tensor) -> torch.Tensor:
        """Repetition divides or multiplies what has occurred in prompt or output; presence and frequency subtract for the output.

        At its most it holds three copies of the logits beside them, masks and counts included (`workspace.unmeasured_bytes`)."""
        counts, in_prompt = self._penalty_state()
        if batch.fresh_penalties is not None:
            parts = tuple(vars(batch.fresh_penalties).values())
            fresh, *pairs = self._upload(np.concatenate(parts)).split([len(part) for part in parts])
            counts.index_fill_(0, fresh, 0)
            in_prompt.index_fill_(0, fresh, False)
            in_prompt.index_put_(tuple(pairs[:2]), in_prompt.new_ones(()))
            counts.index_put_(tuple(pairs[2:4]), pairs[4].to(counts.dtype))
        count = counts[slots]
        seen = in_prompt[slots] | (count > 0)
        columns = self._upload_columns(batch.repetition_penalty, batch.presence_penalty, batch.frequency_penalty)
        repetition, presence, frequency = (column.unsqueeze(-1) for column in columns)
        penalized, multiplied = logits / repetition, logits * repetition
        torch.where(logits > 0, penalized, multiplied, out=penalized)
        del multiplied
        torch.where(seen, penalized, logits, out=penalized)
        penalized -= frequency * count
        penalized -= presence * (count > 0)
        return penalized

    def _edit(self, logits: torch.Tensor, edits: Edits, slots: torch.Tensor, last_tokens: torch.Tensor) -> None:
        """In place; `logits` float32, without holes. No token has two finite changes, so the order in which they are added is all one."""
        if edits.fresh is not None:
            self._keep(edits.fresh)
        rows, known = self._upload(np.stack((edits.rows, edits.last))).unbind()
        last = torch.where(known == ON_DEVICE, last_tokens[slots[rows]], known)
        tokens, values, after = self._edits[slots[rows], :, : edits.width].unbind(1)
        applied = torch.where((after == ALWAYS) | (after == last.unsqueeze(-1)), values.view(torch.float32), 0.0)
        places = rows.unsqueeze(-1) * self._vocab_size + tokens
        logits.view(-1).scatter_add_(0, places.view(-1), applied.view(-1))
        if edits.begun is not None:
            at, tokens, after = self._upload(edits.begun).unbind()
            logits.index_put_((rows[at], tokens), torch.where(after == last[at], -torch.inf, 0.0), accumulate=True)

    def _keep(self, fresh: FreshEdits) -> None:
        count, width = fresh.columns.shape[1:]
        if width > self._edits.shape[-1]:
            wider = self._edits.new_zeros((self._max_slots, count, -(-width // _EDIT_STEP) * _EDIT_STEP))
            wider[..., : self._edits.shape[-1]] = self._edits
            self._edits = wider
        slots, columns = self._upload(fresh.slots), self._upload(fresh.columns)
        self._edits.index_copy_(0, slots, pad(columns, (0, self._edits.shape[-1] - width)))

    def _count(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        counts, _ = self._penalty_state()
        count = counts[slots, tokens]
        counts.index_put_((slots, tokens), count + (count < MAX_COUNT))

    def _penalty_state(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._output_counts is None or self._in_prompt is None:
            shape = (self._max_slots, self._vocab_size)
            self._output_counts = torch.zeros(shape, dtype=torch.int16, device=self._device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
        return self._output_counts, self._in_prompt

    def _with_logprobs(self, logits: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, count: int) -> SampledTokens:
        count = min(count, logits.shape[-1])
        chosen, ids, top = api.token_logprobs(logits[rows], tokens[rows], count, backend=self._backend)
        return SampledTokens(tokens, chosen, ids, top)

    def _upload_columns(self, *columns: NDArray[Any] | None) -> list[torch.Tensor]:
        """Those that are present, float32 [S] each, in one copy. (Top-k fits: float32 is exact up to 2^24.)"""
        return list(self._upload(np.stack([c for c in columns if c is not None]).astype(np.float32, copy=False)).unbind())

    def _upload(self, values: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)
