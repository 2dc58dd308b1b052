"""The sizes of batches that CUDA graphs are made for, as plain numbers: the scheduler cuts chunks to them (`pacing.py`), and
`graph_classes.py` pads the rest."""

from __future__ import annotations

from gantline_runtime.sizing import GRAPH_TOKENS

__all__ = ["decode_sizes", "most_padded", "token_sizes", "token_step"]

_MAX_DECODES = 512
_MOST_TOKENS, _BESIDE_WEIGHTS = 1.3, 256
"""Times a batch's tokens; and tokens that cost little beside the weights that are read anyway (6.5 ms where one row takes 5.4, of an 8B
model on an H100)."""


def decode_sizes(max_size: int) -> list[int]:
    """Of a batch of decodes: 1, 2, 4, 8, then every 8 to 256, every 16 to 512. Products of up to 8 more rows cost nothing extra."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, _MAX_DECODES + 1, 16)]
    return [size for size in sizes if size < max_size] + ([max_size] if max_size <= _MAX_DECODES else [])


def token_step(tokens: int) -> int:
    """How far classes of mixed batches of so many tokens are apart."""
    return 32 if tokens <= 512 else 64 if tokens <= 1024 else 128


def most_padded(tokens: int) -> float:
    """What a mixed batch of so many tokens may be padded to where launches without a graph take time."""
    return max(_MOST_TOKENS * tokens, _BESIDE_WEIGHTS)


def token_sizes(max_tokens: int) -> list[int]:
    """Tokens of a mixed batch: every 32 to 512, every 64 to 1024, every 128 to 2048. Larger ones have no class: their kernels take far
    longer than their launches, so that padding would only cost."""
    sizes = [0]
    while sizes[-1] + token_step(sizes[-1] + 1) <= min(max_tokens, GRAPH_TOKENS):
        sizes.append(sizes[-1] + token_step(sizes[-1] + 1))
    return sizes[1:]
