"""Attention over the paged cache, and the context that tells it which tokens belong to whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gantline_kernels import api

__all__ = ["AttentionContext", "LayerCache", "PagedAttention"]


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer: each [num_blocks, kv_heads of this rank, block_size, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class AttentionContext:
    """One step's tokens (T, of all sequences one after the other) and sequences (B); made once, used by every layer."""

    positions: torch.Tensor
    """int32 [T]: place of each token in its sequence."""
    slots: torch.Tensor
    """int64 [T]: where its key and value go, block * block_size + offset; -1: nowhere (padding)."""
    block_tables: torch.Tensor
    """int32 [B, M]"""
    query_starts: torch.Tensor
    """int32 [B + 1]: sequence b has the tokens query_starts[b] to query_starts[b + 1]."""
    context_lens: torch.Tensor
    """int32 [B]: tokens of the sequence in the cache, this step's among them."""
    max_query_len: int
    max_context_len: int
    num_decodes: int
    """The first so many sequences have one token."""
    shared: api.SharedPrefixes | None = None
    """Which of these begin alike, so that what they share is read once."""


class PagedAttention:
    """Rotate queries and keys, write keys and values to the cache, attend."""

    def __init__(self, *, head_dim: int, sliding_window: int, cos_sin: torch.Tensor, eps: float, backend: str) -> None:
        """`sliding_window` 0: every earlier token is seen; W: the token itself and the W - 1 before it. `eps` is that of the q/k norms."""
        self.scale = head_dim**-0.5
        self.sliding_window = sliding_window
        self.cos_sin = cos_sin
        self.eps = eps
        self.backend = backend

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: LayerCache,
        context: AttentionContext,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """q [T, heads, D], k and v [T, kv_heads, D] (views of one matrix will do) -> [T, heads, D]."""
        q = api.rope_and_cache_write(
            q,
            k,
            v,
            self.cos_sin,
            context.positions,
            cache.keys,
            cache.values,
            context.slots,
            q_norm_weight=q_norm,
            k_norm_weight=k_norm,
            eps=self.eps,
            backend=self.backend,
        )
        return api.paged_attention(
            q,
            cache.keys,
            cache.values,
            context.block_tables,
            context.query_starts,
            context.context_lens,
            self.scale,
            max_query_len=context.max_query_len,
            max_context_len=context.max_context_len,
            num_decodes=context.num_decodes,
            sliding_window=self.sliding_window,
            shared=context.shared,
            backend=self.backend,
        )
