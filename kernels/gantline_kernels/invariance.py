"""What the backends for `EngineConfig.batch_invariant` share: the products that are tried at start-up, and likeliest tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Products", "take_likeliest"]


@dataclass(frozen=True)
class Products:
    """A model's matrices as (inputs, outputs), and its attention's shape. `awq_group_size`: of 4-bit weights, None for plain ones."""

    matrices: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    awq_group_size: int | None = None


def take_likeliest(logits: torch.Tensor, count: int, argmax: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row of logits [S, V], and where: [S, count] each. Of equals the first comes first, whatever `count` is
    and however many rows there are, which torch's topk does not say."""
    rest = logits.float().clone()
    ids = torch.empty((len(logits), count), dtype=torch.int64, device=logits.device)
    for i in range(count):
        ids[:, i] = argmax(rest)
        rest.scatter_(1, ids[:, i : i + 1], -torch.inf)
    return logits.gather(1, ids).float(), ids
