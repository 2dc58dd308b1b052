"""What steps take beside weights and cache: batches that take the most, to be measured with, and what no such batch shows.

`sizing.py` derives the same bytes from the model's shape alone; the engine exports both.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from gantline_runtime import sizing
from gantline_runtime.batch import BatchLimits, BatchShape, segments
from gantline_runtime.kv_cache.prefix_groups import num_groups
from gantline_runtime.prompt_reads import SCORE_ROWS
from gantline_runtime.sampling import Sampler

__all__ = ["largest_steps", "unmeasured_bytes"]


def largest_steps(limits: BatchLimits, max_context: int) -> Iterator[tuple[BatchShape, torch.Tensor]]:
    """(shape, packed batch) of the steps that take the most memory: long prompts, alone and beside every other sequence decoding; prompts
    that all end, so that all are sampled; decoding alone. `max_context` bounds the contexts."""
    sequences = min(limits.max_slots - 1, limits.max_tokens)
    long = _cut(limits.max_tokens, max_context, sequences)
    yield _dummy_batch(0, long, max_context)
    decodes = sequences - len(long)
    if decodes > 0:
        yield _dummy_batch(decodes, _cut(limits.max_tokens - decodes, max_context, len(long)), max_context)
    yield _dummy_batch(0, [min(limits.max_tokens // sequences, max_context)] * sequences, max_context)
    yield _dummy_batch(sequences, [], max_context)


def _cut(num_tokens: int, longest: int, most: int) -> list[int]:
    """Prompts of at most `longest` tokens, at most so many, that are `num_tokens` together if they can."""
    whole, rest = divmod(num_tokens, longest)
    return ([longest] * whole + ([rest] if rest else []))[:most]


def _dummy_batch(num_decodes: int, prompts: list[int], max_context: int) -> tuple[BatchShape, torch.Tensor]:
    """Decoding sequences and prompts of so many tokens, all token 0, that write nowhere and read block 0."""
    lens = np.array([1] * num_decodes + prompts, dtype=np.int32)
    count, longest = len(lens), int(lens.max())
    own = max_context if num_groups(num_decodes) else 0
    shape = BatchShape(int(lens.sum()), count, num_decodes, count, 0, longest, max_context, max_own_len=own)
    words = torch.zeros(shape.num_words, dtype=torch.int32)
    at, array = segments(shape), words.numpy()
    array[at.slots].view(np.int64)[:] = -1
    array[at.query_starts][1:] = np.cumsum(lens)
    array[at.context_lens] = lens
    array[at.rows] = np.arange(count)
    array[at.sample_rows] = np.cumsum(lens) - 1
    array[at.sample_slots] = np.arange(count)
    return shape, words


def unmeasured_bytes(limits: BatchLimits, vocab_size: int, *, graph_layers: int) -> int:
    """What comes later: token counts for penalties, copies of the logits that filters and log-probabilities make, and what the driver keeps
    for each graph of so many layers (0: there are none)."""
    logits = max(limits.max_slots, SCORE_ROWS) * vocab_size * 4
    return Sampler.state_bytes(limits.max_slots, vocab_size) + 3 * logits + sizing.MAX_GRAPHS * graph_layers * sizing.GRAPH_LAYER_BYTES
