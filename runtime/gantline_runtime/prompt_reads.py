"""What a step reads of prompts beside sampling: log-probabilities of their tokens, and sums of hidden states.

Logits of a whole chunk would take gigabytes (8192 rows of a vocabulary of 128k), so they are made, used and dropped `SCORE_ROWS` rows at a
time, and only the numbers that were asked for leave the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gantline_kernels import api
from numpy.typing import NDArray

from gantline_runtime.messages import PromptLogprobs
from gantline_runtime.scheduler import PromptRead, Step

__all__ = ["SCORE_ROWS", "ReadBatch", "ReadTensors", "build_read_batch", "read_rows", "split_reads"]

SCORE_ROWS = 256
"""Rows whose logits exist at once."""


@dataclass(frozen=True)
class ReadBatch:
    """What rank 0 needs to know of a step's reads; `reads` in the order of their rows."""

    reads: tuple[PromptRead, ...]
    targets: NDArray[np.int64]
    """[scored rows]: the token whose log-probability is wanted."""
    num_top: int

    @property
    def pool_counts(self) -> list[int]:
        return [read.count for read in self.reads if read.sequence.pooling is not None]


@dataclass(frozen=True)
class ReadTensors:
    """`chosen` float32 and `ranks` int64 [P], `top_ids` int64 and `top_logprobs` float32 [P, n], `sums` float32 [pooled reads, hidden]."""

    chosen: torch.Tensor | None
    top_ids: torch.Tensor | None
    top_logprobs: torch.Tensor | None
    ranks: torch.Tensor | None
    sums: torch.Tensor | None


def build_read_batch(step: Step) -> ReadBatch | None:
    if not step.reads:
        return None
    scored = [read for read in step.reads if read.sequence.pooling is None]
    targets = [np.frombuffer(r.sequence.tokens, dtype=np.int32)[r.start + 1 : r.start + 1 + r.count] for r in scored]
    return ReadBatch(
        reads=tuple(step.reads),
        targets=np.concatenate(targets).astype(np.int64) if targets else np.zeros(0, dtype=np.int64),
        num_top=max((r.sequence.num_prompt_logprobs or 0 for r in scored), default=0),
    )


def read_rows(
    hidden: torch.Tensor,
    num_scored: int,
    batch: ReadBatch | None,
    logits: Callable[[torch.Tensor], torch.Tensor | None],
    *,
    backend: str,
) -> ReadTensors | None:
    """`hidden` [rows, hidden], the first `num_scored` to be scored. `logits` is a collective, so all ranks come here; those without a
    `batch` get None."""
    targets = None if batch is None else torch.from_numpy(batch.targets).to(hidden.device, non_blocking=True)
    pieces: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, num_scored, SCORE_ROWS):
        piece = slice(start, min(start + SCORE_ROWS, num_scored))
        values = logits(hidden[piece])
        if values is not None and targets is not None and batch is not None:
            pieces.append(_score(values, targets[piece], batch.num_top, backend))
    if batch is None:
        return None
    chosen, top_ids, top, ranks = (torch.cat(column) for column in zip(*pieces, strict=True)) if pieces else (None, None, None, None)
    counts = batch.pool_counts
    sums = torch.stack([part.float().sum(0) for part in hidden[num_scored:].split(counts)]) if counts else None
    return ReadTensors(chosen, top_ids, top, ranks, sums)


def _score(logits: torch.Tensor, targets: torch.Tensor, num_top: int, backend: str) -> tuple[torch.Tensor, ...]:
    chosen, ids, top = api.token_logprobs(logits, targets, min(num_top, logits.shape[-1]), backend=backend)
    wanted = logits.gather(-1, targets.unsqueeze(-1))
    return chosen, ids, top, (logits > wanted).sum(-1) + 1


def split_reads(batch: ReadBatch, host: ReadTensors) -> list[PromptLogprobs | NDArray[np.float32]]:
    """What each read asked for, from tensors that have reached the host."""
    chosen, top_ids, top, ranks = (_rows(tensor) for tensor in (host.chosen, host.top_ids, host.top_logprobs, host.ranks))
    sums = iter(host.sums.numpy() if host.sums is not None else ())
    results: list[PromptLogprobs | NDArray[np.float32]] = []
    at = 0
    for read in batch.reads:
        if read.sequence.pooling is not None:
            results.append(next(sums))
            continue
        rows, count = slice(at, at + read.count), read.sequence.num_prompt_logprobs or 0
        best = [ids[:count] for ids in top_ids[rows]], [values[:count] for values in top[rows]]
        results.append(PromptLogprobs(read.start + 1, chosen[rows], *best, ranks[rows]))
        at += read.count
    return results


def _rows(tensor: torch.Tensor | None) -> list[Any]:
    return [] if tensor is None else tensor.tolist()
