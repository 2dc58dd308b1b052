"""The classes that batches are rounded up to, so that few CUDA graphs (`graphs.py`) fit all of them.

A graph is fixed in the shape of its batch: sequences that decode and the bound on their contexts; with chunks of prompts among them also
tokens and the number of prompts. Which tokens belong to whom is read on the device, so a class covers every mixture of its size. Padding
costs what the linear layers take for its rows; sequences without tokens cost programs that end at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from gantline_runtime.batch import MAX_PADDED_PROMPTS, BatchShape
from gantline_runtime.graph_sizes import decode_sizes, token_sizes
from gantline_runtime.kv_cache.prefix_groups import num_groups

__all__ = ["GraphClasses"]

_FIRST_CONTEXTS = (1024, 2048)
"""Up to the first, decode attention splits no context where its programs fill the chip once; up to the second, none of many sequences."""
_CONTEXT_STEP = 4
_MIXED_DECODES = (0, 16)
_PROMPTS = (4, 16, MAX_PADDED_PROMPTS)


class GraphClasses:
    def __init__(self, *, max_sequences: int, max_tokens: int, session_len: int) -> None:
        """The largest batch, and the largest context."""
        self._decodes = decode_sizes(max_sequences)
        self._tokens = token_sizes(max_tokens)
        self._mixed_decodes = [*(size for size in _MIXED_DECODES if size < max_sequences), max_sequences]
        contexts = [*_FIRST_CONTEXTS]
        while contexts[-1] < session_len:
            contexts.append(contexts[-1] * _CONTEXT_STEP)
        self._contexts = sorted({min(context, session_len) for context in contexts})

    def pad(self, shape: BatchShape) -> BatchShape:
        """The class of a batch, or the batch's own shape where there is none."""
        if shape.num_reads:  # rows of prompts whose states are wanted; rare
            return shape
        context = self.pad_context(shape.max_context_len)
        return self._pad_decodes(shape, context) if shape.is_decode else self._pad_mixed(shape, context)

    def pad_context(self, length: int) -> int:
        """The bound on contexts that a batch is given; `session_len` bounds them all."""
        return next(context for context in self._contexts if context >= length)

    def _pad_decodes(self, shape: BatchShape, context: int) -> BatchShape:
        size = _least(self._decodes, shape.num_decodes)
        if size is None:
            return shape
        own = self._pad_own(shape)
        return shape._replace(num_tokens=size, num_sequences=size, num_decodes=size, max_context_len=context, max_own_len=own, padded=1)

    def _pad_own(self, shape: BatchShape) -> int:
        return (_least(self._contexts, shape.max_own_len) or 0) if shape.max_own_len else 0

    def _pad_mixed(self, shape: BatchShape, context: int) -> BatchShape:
        tokens, prompts = _least(self._tokens, shape.num_tokens), _least(_PROMPTS, shape.num_prompts)
        decodes = _least(self._mixed_decodes, shape.num_decodes)
        if tokens is None or prompts is None or decodes is None:
            return shape
        decodes = min(decodes, tokens)
        return shape._replace(
            num_tokens=tokens,
            num_sequences=decodes + prompts,
            num_decodes=decodes,
            max_query_len=tokens,
            max_context_len=context,
            max_own_len=self._pad_own(shape),
            padded=1,
        )

    def widen(self, padded: BatchShape) -> BatchShape:
        """The class of as many tokens as `padded`, a class, that fits the most batches."""
        decodes = padded.num_decodes if padded.is_decode else min(self._mixed_decodes[-1], padded.num_tokens)
        return padded._replace(
            num_sequences=decodes + padded.num_prompts,
            num_decodes=decodes,
            max_context_len=self._contexts[-1],
            max_own_len=self._contexts[-1] if padded.max_own_len else 0,
        )

    def foreseen(self) -> list[BatchShape]:
        """Wide classes, one of each number of tokens: with few prompts among those that decode, then of decodes alone."""
        prompts, context = _PROMPTS[0], self._contexts[-1]
        mixed = [self.widen(BatchShape(tokens, prompts, 0, 0, 0, tokens, context, padded=1)) for tokens in self._tokens]
        return mixed + [BatchShape(size, size, size, 0, 0, 1, context, padded=1) for size in self._decodes]

    def largest(self) -> list[BatchShape]:
        """The classes whose graphs need the most memory."""
        return [shape for shape in (self._largest_decodes(), self._largest_mixed()) if shape is not None]

    def _largest_decodes(self) -> BatchShape | None:
        if not self._decodes:
            return None
        count = self._decodes[-1]
        own = self._contexts[-1] if num_groups(count) else 0
        return BatchShape(count, count, count, count, 0, 1, self._contexts[-1], max_own_len=own, padded=1)

    def _largest_mixed(self) -> BatchShape | None:
        if not self._tokens:
            return None
        tokens = self._tokens[-1]
        decodes = min(self._mixed_decodes[-1], tokens)
        count, own = decodes + _PROMPTS[-1], self._contexts[-1] if num_groups(decodes) else 0
        return BatchShape(tokens, count, decodes, count, 0, tokens, self._contexts[-1], max_own_len=own, padded=1)


def _least(sizes: Sequence[int], wanted: int) -> int | None:
    """The least of ascending `sizes` that is not below `wanted`."""
    at = bisect_left(sizes, wanted)
    return sizes[at] if at < len(sizes) else None
