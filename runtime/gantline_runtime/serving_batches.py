"""Batches that between them launch every kernel that serving launches, as far as can be foreseen.

Kernels follow from types and sizes alone, so few batches stand for all: one for each choice that attention makes about them. They are run
where kernels are compiled beforehand (`prebuild.py`), and through one layer at a start (`ModelRunner.load_kernels`): a kernel is loaded
when it first runs, for which the device's work must end, and in a step beside others that would cost these the time of a step or two.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch

from gantline_runtime.batch import BatchLimits, BatchShape
from gantline_runtime.checkpoint import ModelShape
from gantline_runtime.graph_classes import GraphClasses
from gantline_runtime.graph_sizes import decode_sizes
from gantline_runtime.kv_cache.prefix_groups import num_groups
from gantline_runtime.sampling import SamplingBatch, TokenMask
from gantline_runtime.sizing import GRAPH_TOKENS

__all__ = ["SAMPLINGS", "all_decodes", "attention_variant", "decode_batch", "loading_batches", "prompt_batch", "sample_sizes"]

_LARGE_STEP = 1024
"""Tokens between batches that are too large for a class: their products are whole tiles of the largest kernels."""


def decode_batch(size: int, context: int, own: int = 0) -> BatchShape:
    """`own`: the bound on what each has beside a shared prefix; 0 where nothing is shared."""
    return BatchShape(size, size, size, size, 0, 1, context, max_own_len=own)


def prompt_batch(count: int, tokens: int, context: int) -> BatchShape:
    """So many prompts of so many tokens each."""
    return BatchShape(count * tokens, count, 0, count, 0, tokens, context)


def all_decodes(sizes: Iterable[int], longest: int, block_size: int) -> Iterator[BatchShape]:
    """These sizes with bounds on contexts that double up to `longest`, without a shared prefix and with ones of all lengths."""
    contexts = [min(block_size, longest)]
    while contexts[-1] < longest:
        contexts.append(min(2 * contexts[-1], longest))
    for size in sizes:
        for at, context in enumerate(contexts):
            yield decode_batch(size, context)
            if num_groups(size):
                for own in contexts[: at + 1]:
                    yield decode_batch(size, context, own)


def attention_variant(
    model: ModelShape, tp: int, element_bytes: int, block_size: int, num_multiprocessors: int, shape: BatchShape
) -> tuple[tuple[int, ...], ...]:
    """Batches of decodes for which it is the same are attended by the same kernels, in layers with a sliding window and without."""
    from gantline_kernels.triton_kernels.decode import decode_variant  # a CPU has no Triton to import

    sizes = (shape.num_decodes, model.num_heads // tp, max(1, model.num_kv_heads // tp), model.head_dim, element_bytes, block_size)
    windows = {0, model.sliding_window or 0}
    return tuple(
        decode_variant(
            *sizes,
            min(shape.max_context_len, window or shape.max_context_len),
            None if window else shape.max_own_len or None,
            num_multiprocessors,
        )
        for window in sorted(windows)
    )


def loading_batches(
    classes: GraphClasses, limits: BatchLimits, block_size: int, variant: Callable[[BatchShape], Hashable]
) -> Iterator[BatchShape]:
    """A batch of each number of tokens that classes have, larger prompts, and decodes of each `variant`. All of padding, if it is packed
    as zeros."""
    longest = limits.max_blocks * block_size
    yield from classes.foreseen()
    for tokens in range(GRAPH_TOKENS + _LARGE_STEP, limits.max_tokens, _LARGE_STEP):
        yield prompt_batch(1, tokens, longest)
    seen: set[Hashable] = set()
    for shape in all_decodes(decode_sizes(min(limits.max_slots - 1, limits.max_tokens)), longest, block_size):
        kind = variant(shape)
        if kind not in seen:
            seen.add(kind)
            yield shape


# ---- sampling


def sample_sizes(limits: BatchLimits) -> list[int]:
    """Numbers of rows whose logits are made, of which each may have a kernel of its own: those of classes, and one more."""
    most = min(limits.max_slots - 1, limits.max_tokens)
    sizes = decode_sizes(most)
    return sorted({*sizes, *(size + 1 for size in sizes if size < most), most})


def _floats(rows: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.ones(rows, dtype=np.float32)


def _drawn(rows: int, vocab_size: int) -> SamplingBatch:
    return SamplingBatch(temperature=_floats(rows), uniforms=_floats(rows))


def _limited(rows: int, vocab_size: int) -> SamplingBatch:
    return replace(_drawn(rows, vocab_size), top_k=np.ones(rows, dtype=np.int64), top_p=_floats(rows), min_p=_floats(rows))


def _penalized(rows: int, vocab_size: int) -> SamplingBatch:
    penalties = dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), _floats(rows))
    return replace(_limited(rows, vocab_size), **penalties)  # type: ignore[arg-type]


def _masked(rows: int, vocab_size: int) -> SamplingBatch:
    allowed = torch.full((rows, -(-vocab_size // 32)), -1, dtype=torch.int32)
    return SamplingBatch(mask=TokenMask(np.arange(rows), allowed))


SAMPLINGS: dict[str, Callable[[int, int], SamplingBatch | None]] = {
    "greedy": lambda rows, vocab_size: None,
    "masked": _masked,
    "drawn": _drawn,
    "limited": _limited,
    "penalized": _penalized,
}
"""Ways to sample (rows, vocabulary) that differ in their kernels. The last takes memory that is kept."""
