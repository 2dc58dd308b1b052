"""What one rank of a tensor-parallel engine knows of the others, and the collectives that layers use.

Sharding follows Megatron-LM (https://arxiv.org/abs/1909.08053): a layer's first matrix is split by outputs, its second by inputs, so each
half of a layer needs one all-reduce. With one rank every collective is the identity and torch.distributed is never touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["Parallel", "Shard"]


@dataclass(frozen=True)
class Shard:
    """Rows (or columns) `start` to `stop` of a dimension of `total`, the part of one rank."""

    start: int
    stop: int
    total: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Parallel:
    rank: int = 0
    size: int = 1

    def shard(self, total: int) -> Shard:
        """This rank's even part of `total`, which the ranks divide without remainder."""
        assert total % self.size == 0, f"{total} cannot be divided by {self.size}"
        part = total // self.size
        return Shard(self.rank * part, (self.rank + 1) * part, total)

    def shard_rounded(self, total: int) -> Shard:
        """This rank's part of `total` when every part but the last ones is `ceil(total / size)`; the last may be smaller, or empty."""
        part = -(-total // self.size)
        return Shard(min(self.rank * part, total), min((self.rank + 1) * part, total), total)

    def shard_heads(self, heads: int, head_dim: int) -> Shard:
        """This rank's rows of a projection to `heads` heads; with more ranks than heads, neighbours hold the same head."""
        if heads >= self.size:
            return self.shard(heads * head_dim)
        head = self.rank * heads // self.size
        return Shard(head * head_dim, (head + 1) * head_dim, heads * head_dim)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """[rows, n] of each rank side by side, [rows, n * size], on rank 0; None elsewhere."""
        if self.size == 1:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, dst=0)
        return torch.cat(parts, dim=-1) if parts is not None else None

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's values, in place."""
        if self.size > 1:
            dist.broadcast(x, src=0)
        return x
