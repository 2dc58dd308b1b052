"""One step's inputs, packed into one array of int32, so that they travel as one copy: to the device, and to other ranks.

    slots (int64, 2 T words) | ids T | positions T | query_starts B+1 | context_lens B | rows B
    | sample_rows S | read_rows R | sample_slots S | update_places (int64, 2 U words) | update_blocks U

T tokens, B sequences, S of them sampled, R rows read beside that, U changed entries of the block tables. A `row` is a sequence's place in
the device's per-request state: its block table and its last token. The segments follow from a `BatchShape` alone, so sender and receiver
need exchange nothing else, and batches that differ in their updates only have the rest at equal addresses (which CUDA graphs ask for).
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gantline_runtime.scheduler import Step

__all__ = ["BatchShape", "Segments", "batch_words", "pack_batch", "segments"]

Words = NDArray[np.int32]


class BatchShape(NamedTuple):
    num_tokens: int
    num_sequences: int
    num_decodes: int
    num_samples: int
    num_updates: int
    max_query_len: int
    max_context_len: int
    num_reads: int = 0
    """Rows that are read beside sampling."""
    num_scored: int = 0
    """The first so many of them are read for their logits."""

    @property
    def num_words(self) -> int:
        return segments(self).update_blocks.stop

    @property
    def is_decode(self) -> bool:
        return self.num_decodes == self.num_tokens

    @property
    def samples_all(self) -> bool:
        """Whether every token's logits are wanted, in order (a batch of decodes)."""
        return self.num_samples == self.num_tokens and not self.num_reads


class Segments(NamedTuple):
    """Word ranges of the packed array."""

    slots: slice
    ids: slice
    positions: slice
    query_starts: slice
    context_lens: slice
    rows: slice
    sample_rows: slice
    read_rows: slice
    sample_slots: slice
    update_places: slice
    update_blocks: slice


def segments(shape: BatchShape) -> Segments:
    t, b, s, u, r = shape.num_tokens, shape.num_sequences, shape.num_samples, shape.num_updates, shape.num_reads
    padding = (1 + b + r) % 2  # 64-bit words begin at even places
    sizes = (2 * t, t, t, b + 1, b, b, s, r, s, padding, 2 * u, u)
    parts = [slice(stop - size, stop) for stop, size in zip(accumulate(sizes), sizes, strict=True)]
    del parts[-3]
    return Segments._make(parts)


def batch_words(*, max_tokens: int, max_sequences: int, max_updates: int) -> int:
    """Words of the largest batch."""
    return 5 * max_tokens + 5 * max_sequences + 2 + 3 * max_updates


def pack_batch(
    out: Words, step: Step, *, tables: Words, updates: list[int], block_size: int, padded_size: int = 0, padded_context: int = 0
) -> BatchShape:
    """Write `step` to `out`. `tables` are the block tables on the host, with a spare last row for padding; `updates` their changes, as
    `CacheManager.take_table_updates` gives them.

    A batch of decodes is padded to `padded_size` sequences (if that is larger): they write nothing, and their tokens go to the spare row.
    `padded_context` raises the bound on contexts that the shape states.
    """
    rows = np.array([s.slot for s in step.sequences], dtype=np.int32)
    starts = np.array(step.starts, dtype=np.int32)
    lens = np.array(step.query_lens, dtype=np.int32)
    sample_rows, sample_slots = np.array(step.sample_rows, dtype=np.int32), np.array([s.slot for s in step.samples], dtype=np.int32)
    decodes_only = step.num_decodes == step.num_tokens
    if decodes_only:
        positions, row_of_token = starts, rows
    else:
        firsts = np.cumsum(lens) - lens
        positions = np.repeat(starts - firsts, lens) + np.arange(step.num_tokens, dtype=np.int32)
        row_of_token = np.repeat(rows, lens)
    slots = tables[row_of_token, positions // block_size].astype(np.int64) * block_size + positions % block_size
    contexts = starts + lens
    missing = max(0, padded_size - step.num_tokens) if decodes_only else 0
    if missing:
        spare = np.full(missing, len(tables) - 1, dtype=np.int32)
        rows, sample_slots = np.concatenate([rows, spare]), np.concatenate([sample_slots, spare])
        positions = np.concatenate([positions, np.zeros(missing, dtype=np.int32)])
        slots = np.concatenate([slots, np.full(missing, -1, dtype=np.int64)])
        lens, contexts = (np.concatenate([x, np.ones(missing, dtype=np.int32)]) for x in (lens, contexts))
        sample_rows = np.arange(padded_size, dtype=np.int32)
    shape = BatchShape(
        num_tokens=step.num_tokens + missing,
        num_sequences=len(rows),
        num_decodes=step.num_decodes + missing,
        num_samples=len(sample_rows),
        num_updates=len(updates) // 2,
        max_query_len=int(lens.max()),
        max_context_len=max(int(contexts.max()), padded_context),
        num_reads=sum(read.count for read in step.reads),
        num_scored=sum(read.count for read in step.reads if read.sequence.pooling is None),
    )
    at = segments(shape)
    out[at.slots] = slots.view(np.int32)
    out[at.positions] = positions
    out[at.query_starts.start] = 0
    np.cumsum(lens, out=out[at.query_starts.start + 1 : at.query_starts.stop])
    out[at.context_lens] = contexts
    out[at.rows] = rows
    out[at.sample_rows] = sample_rows
    if shape.num_reads:
        out[at.read_rows] = np.concatenate([np.arange(read.row, read.row + read.count, dtype=np.int32) for read in step.reads])
    out[at.sample_slots] = sample_slots
    if updates:
        out[at.update_places].view(np.int64)[:] = updates[::2]
        out[at.update_blocks] = updates[1::2]
    _pack_prompt_ids(out[at.ids], step)
    return shape


def _pack_prompt_ids(ids: Words, step: Step) -> None:
    """Tokens of the chunks; a decoding sequence's token is on the device, and is put in there."""
    at = step.num_decodes
    for i in range(step.num_decodes, len(step.sequences)):
        start, count = step.starts[i], step.query_lens[i]
        ids[at : at + count] = np.frombuffer(step.sequences[i].tokens, dtype=np.int32)[start : start + count]
        at += count
