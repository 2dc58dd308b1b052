"""Where a checkpoint's tensors go.

A layer describes each tensor it needs as a `Target`: which part of the stored tensor this rank needs, and the memory that it fills. The
loader only reads targets, so sharding and packing (query, key and value into one matrix) happen while reading, without a second copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

__all__ = ["BuildContext", "Target", "vector_target"]


@dataclass(frozen=True)
class Target:
    """`destination` (any strides) receives `tensor[source]`, converted to its type; `shape` is what the whole stored tensor must have."""

    name: str
    shape: tuple[int, ...]
    source: tuple[slice, ...]
    destination: torch.Tensor


@dataclass(frozen=True)
class BuildContext:
    """How layers make their weights: type and device, and the kernels' backend."""

    dtype: torch.dtype
    device: torch.device
    backend: str

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor for weights. On a GPU it is zero: steps are tried there before they have come, and may not meet what is no number."""
        make = torch.empty if self.device.type == "cpu" else torch.zeros
        return make(shape, dtype=dtype or self.dtype, device=self.device)


def vector_target(name: str, destination: torch.Tensor) -> Iterator[Target]:
    """The whole of a one-dimensional tensor."""
    size = destination.shape[0]
    yield Target(name, (size,), (slice(0, size),), destination)


TargetSource = Callable[[], Iterator[Target]]
