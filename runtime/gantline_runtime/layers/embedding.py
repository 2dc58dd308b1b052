"""Token embedding and output head, split over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from gantline_kernels import api

from gantline_runtime.layers.weights import BuildContext, Target
from gantline_runtime.parallel import Parallel

__all__ = ["VocabularyMatrix"]


class VocabularyMatrix:
    """Rows of a [vocabulary, hidden] matrix: looked up as an embedding, multiplied with as a head, or both where they are tied.

    Every rank holds as many rows; what exceeds the vocabulary is zero, and its logits are cut off after gathering.
    """

    def __init__(self, name: str, vocab_size: int, hidden_size: int, *, parallel: Parallel, build: BuildContext) -> None:
        self._name = name
        self._parallel = parallel
        self._backend = build.backend
        self._vocab_size = vocab_size
        self._shard = parallel.shard_rounded(vocab_size)
        rows = -(-vocab_size // parallel.size)
        self.weight = build.empty(rows, hidden_size)
        self.weight[self._shard.size :].zero_()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[T] token numbers -> [T, hidden]."""
        if self._parallel.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self._shard.start
        mine = (local >= 0) & (local < self._shard.size)
        rows = F.embedding(local * mine, self.weight)
        return self._parallel.all_reduce(rows * mine.unsqueeze(-1))

    def logits(self, x: torch.Tensor) -> torch.Tensor | None:
        """[rows, hidden] -> [rows, vocabulary] on rank 0, None elsewhere."""
        logits = self._parallel.gather(api.linear(x, self.weight, out_dtype=torch.float32, backend=self._backend))
        return None if logits is None else logits[:, : self._vocab_size]

    def targets(self) -> Iterator[Target]:
        shape = (self._vocab_size, self.weight.shape[1])
        if self._shard.size:
            yield Target(f"{self._name}.weight", shape, (self._shard.slice, slice(0, shape[1])), self.weight[: self._shard.size])
