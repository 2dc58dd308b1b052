"""Chunks of prompts cut over the keys as well as over the queries, where their tiles of queries are too few to fill the GPU.

A chunk of 32 tokens over a context of 30,000 is one tile of queries for each key/value head: without more, 8 multiprocessors would read all
the keys while the others wait. The host says from sizes whether that may be so, and gives memory for partial results; how far tiles are
cut, the kernels decide on the device (`cuda_kernels/prefill_work.cuh`, `triton_kernels/prefill_plan.py`): only there are a padded batch's
true lengths known.
"""

from __future__ import annotations

import torch

__all__ = ["MAX_PARTS", "MAX_SEQUENCES", "PLAN_WORDS", "SLOTS", "new_parts", "num_slots"]

SLOTS = 512
"""Most partial results of one launch, each of a tile of at most 128 rows: 34 MB with head dimension 128."""
MAX_PARTS = 64
"""Of one tile."""
MAX_SEQUENCES = 32
"""With more prompts in a step there are tiles enough."""
PLAN_WORDS = 512
_LEAST_KEYS = 1024
"""A tile that sees no more is not worth cutting."""
_MOST_TILES = 4
"""Of queries, and parts of them, for each multiprocessor: with more there is little to gain, since only the last round has idle ones."""


def num_slots(sequences: int, tiles: int, max_keys: int, num_sms: int) -> int:
    """Partial results to make room for; 0: do not split. `tiles` of rows in all heads, `max_keys` that a tile may see."""
    few = sequences <= MAX_SEQUENCES and tiles <= _MOST_TILES * num_sms
    return min(SLOTS, _MOST_TILES * num_sms) if few and max_keys > _LEAST_KEYS else 0


def new_parts(slots: int, rows: int, dim: int, device: torch.device) -> torch.Tensor:
    """Memory for the partial results of one launch, float32: means [slots, rows, dim]; of the sums of their weights the logarithms to the
    base 2 [slots, rows]; PLAN_WORDS of the kernel's own, of which the third, int32, is the number of tiles of keys in a part."""
    return torch.empty(slots * rows * (dim + 1) + PLAN_WORDS, dtype=torch.float32, device=device)
