"""What requests change in logits: biases, stop tokens that are held back, and bad words.

The device keeps each request's changes from its first sample on, so a step tells it only in which rows they apply, and what has changed:
requests that are new, stop tokens that are held back no longer, and of bad words of three tokens and more those that are begun.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gantline_runtime.request import Sequence

__all__ = ["ALWAYS", "NONE_YET", "ON_DEVICE", "EditTable", "Edits", "FreshEdits"]

ALWAYS = -1
"""In place of a token after which a change applies."""
ON_DEVICE, NONE_YET = -1, -2
"""In place of a row's last token: only the device knows it; the answer has not begun."""

Integers = NDArray[np.int64]
Columns = NDArray[np.int32]


@dataclass(frozen=True)
class FreshEdits:
    """Requests whose changes are to be kept on the device from now on: `slots` int64 [N], `columns` int32 [N, 3, W]: tokens; what is added
    to their logits (the bits of a float32; -inf forbids a token); the token that must come right before, or ALWAYS. Zeros are neutral."""

    slots: Integers
    columns: Columns


@dataclass(frozen=True)
class Edits:
    """The rows of a step in which what is kept on the device applies."""

    rows: Integers
    """int64 [R]."""
    last: Integers
    """int64 [R]: the token before each row's sample, or ON_DEVICE, or NONE_YET."""
    width: int
    """The most columns that any of these rows has."""
    fresh: FreshEdits | None = None
    begun: Integers | None = None
    """int64 [3, n]: places in `rows`, tokens that are forbidden there in this step alone, the tokens that must come right before them."""


class EditTable:
    """The host's side: which slots hold requests that change logits, and how."""

    def __init__(self, max_slots: int) -> None:
        self._columns: dict[int, Columns] = {}
        """[3, W] of each of these slots."""
        self._widths = np.zeros(max_slots, dtype=np.int64)
        self._num_stops = np.zeros(max_slots, dtype=np.int64)
        """The leading columns that forbid stop tokens while an answer may not end."""
        self._long_words: dict[int, _LongWords] = {}
        self._has_long_words = np.zeros(max_slots, dtype=np.bool_)
        self._fresh: set[int] = set()

    def set(self, sequence: Sequence) -> bool:
        """Take over what a sequence changes that samples its first token in this slot; False if that is nothing."""
        params, slot = sequence.sampling, sequence.slot
        stops = sorted(sequence.stop_ids) if params.min_new_tokens else []
        if not (params.logit_bias or params.bad_words or stops):
            return False
        self._columns[slot] = columns = _columns(stops, params.logit_bias, params.bad_words)
        self._widths[slot] = columns.shape[1]
        self._num_stops[slot] = len(stops)
        long = [word for word in params.bad_words if len(word) > 2]
        self._has_long_words[slot] = bool(long)
        if long:
            self._long_words[slot] = _LongWords(long)
        self._fresh.add(slot)
        return True

    def batch(self, samples: Seq[Sequence], rows: Integers, num_decodes: int) -> Edits | None:
        """The changes of a step in these of its `rows`, in order; None if there are none. `num_decodes`: of the first so many `samples` the
        last token may be on the device alone. (All before it are known, since steps run at most one ahead.)"""
        members = [samples[row] for row in rows.tolist()]
        slots = np.array([member.slot for member in members], dtype=np.int64)
        for at in np.flatnonzero(self._num_stops[slots]).tolist():
            if members[at].num_sampled > members[at].min_new_tokens:  # this sample counts already
                self._release_stops(members[at].slot)
        begun = self._begun(members, slots)
        width = int(self._widths[slots].max())
        if not (width or self._fresh or begun is not None):
            return None
        last = np.full(len(rows), ON_DEVICE, dtype=np.int64)
        decodes = int(np.searchsorted(rows, num_decodes))
        last[decodes:] = [member.tokens[-1] if member.num_generated else NONE_YET for member in members[decodes:]]
        return Edits(rows, last, width, self._take_fresh(), begun)

    def _release_stops(self, slot: int) -> None:
        self._columns[slot] = self._columns[slot][:, self._num_stops[slot] :]
        self._widths[slot] -= self._num_stops[slot]
        self._num_stops[slot] = 0
        self._fresh.add(slot)

    def _take_fresh(self) -> FreshEdits | None:
        if not self._fresh:
            return None
        slots = sorted(self._fresh)
        self._fresh.clear()
        columns = np.zeros((len(slots), 3, max(self._columns[slot].shape[1] for slot in slots)), dtype=np.int32)
        for at, slot in enumerate(slots):
            columns[at, :, : self._columns[slot].shape[1]] = self._columns[slot]
        return FreshEdits(np.array(slots, dtype=np.int64), columns)

    def _begun(self, members: Seq[Sequence], slots: Integers) -> Integers | None:
        places: list[int] = []
        ends: list[Integers] = []
        for at in np.flatnonzero(self._has_long_words[slots]).tolist():
            found = self._long_words[members[at].slot].begun(members[at])
            places += [at] * len(found)
            ends += found
        if not ends:
            return None
        begun = np.empty((3, sum(end.shape[1] for end in ends)), dtype=np.int64)
        begun[0] = np.repeat(places, [end.shape[1] for end in ends])
        np.concatenate(ends, axis=1, out=begun[1:])
        return begun


def _columns(stops: Seq[int], biases: dict[int, float], words: Iterable[tuple[int, ...]]) -> Columns:
    """Stop tokens first, then biases, then bad words of one token and of two."""
    alone = [word[0] for word in words if len(word) == 1]
    pairs = [word for word in words if len(word) == 2]
    tokens = [*stops, *biases, *alone, *(token for _, token in pairs)]
    values = np.full(len(tokens), -np.inf, dtype=np.float32)
    values[len(stops) : len(stops) + len(biases)] = list(biases.values())
    after = np.full(len(tokens), ALWAYS, dtype=np.int32)
    after[len(tokens) - len(pairs) :] = [before for before, _ in pairs]
    return np.stack((np.array(tokens, dtype=np.int32), values.view(np.int32), after))


class _LongWords:
    """Bad words of three tokens and more, found by the tokens before their last two."""

    def __init__(self, words: Iterable[tuple[int, ...]]) -> None:
        self._ends: defaultdict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        """By all tokens but the last two: the last, and the one before it."""
        self._lengths: defaultdict[int, set[int]] = defaultdict(set)
        """By the token before the last two: how long such beginnings are."""
        for *begin, before, last in words:
            self._ends[tuple(begin)].append((last, before))
            self._lengths[begin[-1]].add(len(begin))
        self._arrays: dict[tuple[int, ...], Integers] = {}

    def begun(self, sequence: Sequence) -> list[Integers]:
        """[2, n] each: last tokens of words whose beginning ends before the token before this sample, and the tokens before these."""
        end = sequence.prompt_len + sequence.num_sampled - 2  # without this sample and the last
        if end <= sequence.prompt_len:
            return []
        lengths = self._lengths.get(sequence.tokens[end - 1], ())
        begins = (tuple(sequence.tokens[end - length : end]) for length in lengths if length <= end - sequence.prompt_len)
        return [self._array(begin) for begin in begins if begin in self._ends]

    def _array(self, begin: tuple[int, ...]) -> Integers:
        if begin not in self._arrays:
            self._arrays[begin] = np.array(self._ends[begin], dtype=np.int64).T
        return self._arrays[begin]
