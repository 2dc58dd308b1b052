# mypy: disable-error-code="no-untyped-def"
"""Forbidding tokens by a bitmask. Reads the bits, writes the forbidden logits, and never reads a logit: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gantline_kernels.triton_kernels.integers import cdiv

__all__ = ["mask_tokens"]

_WORDS = 64
"""Words of one program: 2048 logits, which are 8 KB of float32 to write at most."""


@triton.jit
def _mask_tokens(logits, rows, allowed, stride, size, words, WORDS: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + entry)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    bits = tl.load(allowed + entry * words + word, mask=word < words, other=0)
    place = tl.arange(0, 32)
    token = word[:, None] * 32 + place[None, :]
    forbidden = ((bits[:, None] >> place[None, :]) & 1) == 0
    tl.store(logits + row * stride + token, -float("inf"), mask=forbidden & (token < size))


def mask_tokens(logits: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor) -> None:
    count, words = allowed.shape
    if count:
        grid = (count, cdiv(words, _WORDS))
        _mask_tokens[grid](logits, rows, allowed, logits.stride(0), logits.shape[1], words, WORDS=_WORDS, num_warps=4)
