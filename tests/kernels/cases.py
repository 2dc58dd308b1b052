"""Inputs that every backend is tested with: paged caches whose unused parts are NaN, so that reading them shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from gantline_kernels import reference
from gantline_kernels.api import SharedPrefixes


@dataclass
class Paged:
    """A batch for paged attention. Blocks are handed out in random order; what no sequence owns is NaN."""

    q: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    scale: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[object, ...]:
        return self.q, self.key_cache, self.value_cache, self.block_tables, self.query_starts, self.context_lens, self.scale

    def expected(self) -> torch.Tensor:
        return reference.paged_attention(*self.arguments, **self.options)  # type: ignore[arg-type]

    def share(self, groups: list[tuple[list[int], int]], *, spare_groups: int = 0) -> Paged:
        """Let the sequences of each group (numbers, blocks) begin with the first one's blocks; those that they had become NaN."""
        decodes, block_size = self.options["num_decodes"], self.key_cache.shape[2]
        lens, members, starts = [0] * decodes, [], [0]
        for group, count in groups:
            first, *others = group
            for i in others:
                for cache in (self.key_cache, self.value_cache):
                    cache[self.block_tables[i, :count].long()] = torch.nan
                self.block_tables[i, :count] = self.block_tables[first, :count]
            for i in group:
                lens[i] = count * block_size
            members += group
            starts.append(len(members))
        starts += starts[-1:] * spare_groups
        own = max(context - length for context, length in zip(self.context_lens.tolist(), lens, strict=False))
        members += [1 << 30] * (decodes - len(members))
        tensors = (torch.tensor(x, dtype=torch.int32, device=self.q.device) for x in (lens, members, starts))
        self.options["shared"] = SharedPrefixes(*tensors, max_own_len=own)
        return self


def paged(
    lengths: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    window: int = 0,
    softcap: float = 0.0,
    seed: int = 0,
    num_decodes: int | None = None,
    padding: int = 0,
) -> Paged:
    """A batch of sequences given as (new tokens, context including them), and `padding` rows of no sequence.

    Leading ones with one new token count as decodes, or the first `num_decodes`.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-context // block_size) for _, context in lengths]
    total = sum(blocks)
    keys, values = (torch.randn(total, kv_heads, block_size, dim, generator=generator).to(dtype) for _ in range(2))
    order = torch.randperm(total, generator=generator).int()
    tables = torch.full((len(lengths), max(blocks)), 1 << 30, dtype=torch.int32)
    at = 0
    for i, ((_, context), count) in enumerate(zip(lengths, blocks, strict=True)):
        tables[i, :count] = order[at : at + count]
        if context % block_size:
            for cache in (keys, values):
                cache[order[at + count - 1].long(), :, context % block_size :] = torch.nan
        at += count
    new = [query for query, _ in lengths]
    decodes = num_decodes if num_decodes is not None else next((i for i, query in enumerate(new) if query != 1), len(new))
    starts = torch.tensor([0, *new]).cumsum(0).int()
    q = torch.randn(sum(new) + padding, heads, dim, generator=generator).to(dtype)
    contexts = torch.tensor([context for _, context in lengths], dtype=torch.int32)
    options: dict[str, Any] = {
        "max_query_len": max(new), "max_context_len": max(c for _, c in lengths), "num_decodes": decodes,
        "sliding_window": window, "logit_softcap": softcap,
    }  # fmt: skip
    tensors = (x.to(device) for x in (q, keys, values, tables, starts, contexts))
    return Paged(*tensors, dim**-0.5, options)


def largest_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference; NaN or infinity anywhere is an error of infinity."""
    assert got.shape == expected.shape, f"{list(got.shape)} is not {list(expected.shape)}"
    if not bool(torch.isfinite(got.float()).all()):
        return float("inf")
    return float((got.float() - expected.float()).abs().max()) if got.numel() else 0.0
