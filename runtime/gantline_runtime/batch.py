"""One step's inputs, packed into one array of int32, so that they travel as one copy: to the device, and to other ranks.

    slots (int64, 2 T words) | ids T | positions T | query_starts B+1 | context_lens B | rows B
    | shared_lens D | shared_members D | shared_starts G+1
    | sample_rows S | read_rows R | sample_slots S | update_places (int64, 2 U words) | update_blocks U

T tokens, B sequences, S rows whose logits may be wanted, R rows read beside that, U changed entries of the block tables. A `row` is a
sequence's place in the device's per-request state: its block table and its last token. An id below zero stands for the last token of row
~id, which an earlier step has sampled. D sequences decode, in at most G groups that share a prefix; where none does, these three parts are
empty. The segments follow from a `BatchShape` alone, so sender and receiver need exchange nothing else.

A padded batch has the sizes of a class, so that one CUDA graph fits all batches of the class: sequences without tokens fill up those that
decode, others those with a chunk of a prompt; tokens that belong to no sequence, and are written nowhere, come last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gantline_runtime.kv_cache.prefix_groups import MAX_GROUPS, PrefixGroups, num_groups
from gantline_runtime.scheduler import Step

__all__ = ["MAX_PADDED_PROMPTS", "BatchLimits", "BatchShape", "Segments", "pack_batch", "pack_padding", "segments"]

Words = NDArray[np.int32]

MAX_PADDED_PROMPTS = 64
"""Most sequences with chunks of prompts in a padded batch."""


class BatchShape(NamedTuple):
    num_tokens: int
    num_sequences: int
    num_decodes: int
    """The first so many sequences have one token at most."""
    num_samples: int
    num_updates: int
    max_query_len: int
    max_context_len: int
    num_reads: int = 0
    """Rows that are read beside sampling; none in a padded batch."""
    num_scored: int = 0
    """The first so many of them are read for their logits."""
    max_own_len: int = 0
    """Where sequences that decode share prefixes: bound on what any has beside its shared part, its whole context if it shares nothing;
    otherwise 0."""
    padded: int = 0
    """1: all but `num_samples` and `num_updates` are those of a class."""
    capture: int = 0
    """1: a CUDA graph of its class is to be captured."""

    @property
    def num_words(self) -> int:
        return segments(self).update_blocks.stop

    @property
    def graph(self) -> BatchShape:
        """Of a padded batch what its class is known by: the same for all its batches."""
        return self._replace(num_samples=0, num_updates=0, capture=0)

    @property
    def is_decode(self) -> bool:
        """Whether no sequence has a chunk of a prompt; then rows of tokens and of samples are the same."""
        return self.num_decodes == self.num_sequences

    @property
    def num_prompts(self) -> int:
        return self.num_sequences - self.num_decodes

    @property
    def num_groups(self) -> int:
        """Most groups of sequences that share a prefix."""
        return num_groups(self.num_decodes) if self.max_own_len else 0

    @property
    def num_sample_rows(self) -> int:
        return self.num_sequences if self.padded else self.num_samples


class Segments(NamedTuple):
    """Word ranges of the packed array."""

    slots: slice
    ids: slice
    positions: slice
    query_starts: slice
    context_lens: slice
    rows: slice
    shared_lens: slice
    shared_members: slice
    shared_starts: slice
    sample_rows: slice
    read_rows: slice
    sample_slots: slice
    update_places: slice
    update_blocks: slice


def segments(shape: BatchShape) -> Segments:
    t, b, s, u, r = shape.num_tokens, shape.num_sequences, shape.num_sample_rows, shape.num_updates, shape.num_reads
    d, g = (shape.num_decodes, shape.num_groups + 1) if shape.max_own_len else (0, 0)
    padding = (1 + b + g + r) % 2  # 64-bit words begin at even places
    sizes = (2 * t, t, t, b + 1, b, b, d, d, g, s, r, s, padding, 2 * u, u)
    parts = [slice(stop - size, stop) for stop, size in zip(accumulate(sizes), sizes, strict=True)]
    del parts[-3]
    return Segments._make(parts)


@dataclass(frozen=True)
class BatchLimits:
    """Largest step: tokens, sequences, and blocks of one sequence. `max_slots` counts the spare row for padding."""

    max_tokens: int
    max_slots: int
    max_blocks: int

    @property
    def max_sequences(self) -> int:
        """Sequences of a batch, padding included."""
        return self.max_slots + MAX_PADDED_PROMPTS

    @property
    def max_updates(self) -> int:
        """Changed block-table entries of one step: all of newly admitted sequences, one for each decoding one."""
        return self.max_slots * (self.max_blocks + 1)

    @property
    def max_words(self) -> int:
        """Words of the largest packed batch."""
        return 5 * self.max_tokens + 7 * self.max_sequences + MAX_GROUPS + 3 + 3 * self.max_updates


def pack_batch(
    out: Words,
    step: Step,
    *,
    tables: Words,
    updates: list[int],
    block_size: int,
    groups: PrefixGroups | None = None,
    pad: Callable[[BatchShape], BatchShape] | None = None,
) -> BatchShape:
    """Write `step` to `out`. `tables` are the block tables on the host, with a spare last row for padding; `updates` their changes, as
    `CacheManager.take_table_updates` gives them. `groups` knows who shares a prefix; None: nobody. `pad` gives the padded shape of a
    batch, or the batch's own.
    """
    starts, lens = np.array(step.starts, dtype=np.int32), np.array(step.query_lens, dtype=np.int32)
    rows = np.array([s.slot for s in step.sequences], dtype=np.int32)
    grouping = groups.group(rows[: step.num_decodes]) if groups is not None else None
    shape = BatchShape(
        num_tokens=step.num_tokens,
        num_sequences=len(rows),
        num_decodes=step.num_decodes,
        num_samples=len(step.samples),
        num_updates=len(updates) // 2,
        max_query_len=int(lens.max()),
        max_context_len=int((starts + lens).max()),
        num_reads=sum(read.count for read in step.reads),
        num_scored=sum(read.count for read in step.reads if read.sequence.pooling is None),
        max_own_len=0 if grouping is None else int((starts[: step.num_decodes] + 1 - grouping.lens).max()),
    )
    shape = shape if pad is None else pad(shape)
    at = segments(shape)
    _pack_sequences(out, at, shape, step.num_decodes, rows, starts, lens, len(tables) - 1)
    _pack_tokens(out, at, step, rows, starts, lens, tables, block_size)
    if grouping is not None:
        _fill(out[at.shared_lens], grouping.lens, 0)
        _fill(out[at.shared_members], grouping.members, 0)
        _fill(out[at.shared_starts], grouping.starts, int(grouping.starts[-1]))
    _fill(out[at.sample_rows], step.sample_rows, 0)
    _fill(out[at.sample_slots], [s.slot for s in step.samples], len(tables) - 1)
    if shape.num_reads:
        out[at.read_rows] = np.concatenate([np.arange(read.row, read.row + read.count, dtype=np.int32) for read in step.reads])
    if updates:
        out[at.update_places].view(np.int64)[:] = updates[::2]
        out[at.update_blocks] = updates[1::2]
    return shape


def pack_padding(out: Words, shape: BatchShape, spare: int) -> None:
    """Write a padded batch without any sequence to `out`: `spare` is the block tables' row for padding."""
    at = segments(shape)
    out[: shape.num_words] = 0
    out[at.slots].view(np.int64)[:] = -1
    out[at.rows] = spare
    out[at.sample_slots] = spare


def _fill(target: Words, values: Words | list[int], rest: int) -> None:
    target[: len(values)] = values
    target[len(values) :] = rest


def _pack_sequences(
    out: Words, at: Segments, shape: BatchShape, num_decodes: int, rows: Words, starts: Words, lens: Words, spare: int
) -> None:
    """Those that decode, those with chunks of prompts, each followed by its padding."""
    out[at.query_starts.start] = 0
    ends, contexts, places = (out[s] for s in (slice(at.query_starts.start + 1, at.query_starts.stop), at.context_lens, at.rows))
    for part, source in (
        (slice(0, shape.num_decodes), slice(0, num_decodes)),
        (slice(shape.num_decodes, shape.num_sequences), slice(num_decodes, None)),
    ):
        _fill(ends[part], lens[source], 0)
        _fill(contexts[part], starts[source] + lens[source], 0)
        _fill(places[part], rows[source], spare)
    np.cumsum(ends, out=ends)


def _pack_tokens(out: Words, at: Segments, step: Step, rows: Words, starts: Words, lens: Words, tables: Words, block_size: int) -> None:
    num_decodes = step.num_decodes
    positions, row_of_token = starts, rows
    if num_decodes < len(rows):
        firsts = np.cumsum(lens, dtype=np.int32) - lens
        positions = np.repeat(starts - firsts, lens) + np.arange(step.num_tokens, dtype=np.int32)
        row_of_token = np.repeat(rows, lens)
    slots = out[at.slots].view(np.int64)
    slots[: step.num_tokens] = tables[row_of_token, positions // block_size]
    slots[: step.num_tokens] *= block_size
    slots[: step.num_tokens] += positions % block_size
    slots[step.num_tokens :] = -1
    _fill(out[at.positions], positions, 0)
    ids = out[at.ids]
    _fill(ids, ~rows[:num_decodes], 0)
    end = num_decodes
    for sequence, start, count in zip(step.sequences[num_decodes:], step.starts[num_decodes:], step.query_lens[num_decodes:], strict=True):
        ids[end : end + count] = np.frombuffer(sequence.tokens, dtype=np.int32)[start : start + count]
        end += count
