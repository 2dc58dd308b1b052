"""One rank's half of a step that touches tensors: weights, cache, per-request device state, forward pass, sampling.

`ModelRunner.execute` takes a packed batch (`batch.py`) and returns at once where the device works by itself (CUDA); what was sampled is
read later from the `PendingTokens`. Sampled tokens stay on the device in `last_tokens`, where the next step finds its inputs, so no step
waits for the host to see the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gantline_runtime.batch import BatchShape, batch_words, segments
from gantline_runtime.checkpoint import Checkpoint
from gantline_runtime.layers.attention import AttentionContext, LayerCache
from gantline_runtime.layers.weights import BuildContext
from gantline_runtime.loader import Progress, load_weights
from gantline_runtime.messages import TokenLogprobs
from gantline_runtime.models import build_model
from gantline_runtime.parallel import Parallel
from gantline_runtime.sampling import SampledTokens, Sampler, SamplingBatch

__all__ = ["BatchLimits", "ModelRunner", "PendingTokens"]


@dataclass(frozen=True)
class BatchLimits:
    """Largest step: tokens, sequences, and blocks of one sequence. `max_slots` counts the spare row for padding."""

    max_tokens: int
    max_slots: int
    max_blocks: int

    @property
    def max_updates(self) -> int:
        """Changed block-table entries of one step: all of newly admitted sequences, one for each decoding one."""
        return self.max_slots * (self.max_blocks + 1)


class PendingTokens:
    """Tokens of a step on their way to the host; `read` is the one place where the host waits for the device."""

    def __init__(self, device: torch.device, sampled: SampledTokens | None, sampling: SamplingBatch | None, num_samples: int) -> None:
        """`sampled` None: the step samples nothing, but is waited for all the same."""
        self._sampling = sampling
        self._num_samples = num_samples
        self._host = None if sampled is None else SampledTokens(*(None if t is None else self._copy_out(t) for t in _tensors(sampled)))
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    @staticmethod
    def _copy_out(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_cuda:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    @property
    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def read(self) -> tuple[list[int], list[TokenLogprobs | None] | None]:
        """(token of each sample, log-probabilities where asked for)."""
        if self._event is not None:
            self._event.synchronize()
        if self._host is None:
            return [], None
        return self._host.tokens[: self._num_samples].tolist(), self._read_logprobs(self._host)

    def _read_logprobs(self, host: SampledTokens) -> list[TokenLogprobs | None] | None:
        sampling = self._sampling
        if host.chosen_logprobs is None or host.top_ids is None or host.top_logprobs is None or sampling is None:
            return None
        assert sampling.logprob_rows is not None
        entries: list[TokenLogprobs | None] = [None] * self._num_samples
        columns = zip(
            sampling.logprob_rows.tolist(),
            sampling.logprob_counts,
            host.chosen_logprobs.tolist(),
            host.top_ids.tolist(),
            host.top_logprobs.tolist(),
            strict=True,
        )
        for row, count, chosen, ids, logprobs in columns:
            entries[row] = TokenLogprobs(chosen, ids[:count], logprobs[:count])
        return entries


def _tensors(sampled: SampledTokens) -> tuple[torch.Tensor | None, ...]:
    return sampled.tokens, sampled.chosen_logprobs, sampled.top_ids, sampled.top_logprobs


class ModelRunner:
    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        session_len: int,
        build: BuildContext,
        parallel: Parallel,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Loads the weights. `session_len` bounds positions; the cache follows with `allocate`."""
        self.device = build.device
        self.parallel = parallel
        self._dtype = build.dtype
        self._backend = build.backend
        self._shape = checkpoint.shape
        self._model = build_model(checkpoint, session_len=session_len, parallel=parallel, build=build)
        self.weight_bytes = load_weights(checkpoint, self._model.targets(), on_progress)
        self._caches: list[LayerCache] = []

    def cache_block_bytes(self, block_size: int) -> int:
        """Bytes of one block in all layers of this rank."""
        return 2 * self._shape.num_layers * self._model.kv_heads * block_size * self._shape.head_dim * self._dtype.itemsize

    def allocate(self, num_blocks: int, block_size: int, limits: BatchLimits) -> None:
        """The cache, in one allocation, and the per-request state. Raises torch.OutOfMemoryError or RuntimeError."""
        shape = (self._shape.num_layers, 2, num_blocks, self._model.kv_heads, block_size, self._shape.head_dim)
        memory = torch.empty(shape, dtype=self._dtype, device=self.device)
        self._caches = [LayerCache(layer[0], layer[1]) for layer in memory]
        self._limits = limits
        self._tables = torch.zeros((limits.max_slots, limits.max_blocks), dtype=torch.int32, device=self.device)
        self._last_tokens = torch.zeros(limits.max_slots, dtype=torch.int64, device=self.device)
        self._sampler = Sampler(max_slots=limits.max_slots, vocab_size=self._shape.vocab_size, device=self.device, backend=self._backend)
        words = batch_words(max_tokens=limits.max_tokens, max_sequences=limits.max_slots, max_updates=0)
        self._inputs = torch.zeros(words, dtype=torch.int32, device=self.device)

    @torch.inference_mode()
    def execute(self, words: torch.Tensor, shape: BatchShape, sampling: SamplingBatch | None, num_samples: int) -> PendingTokens:
        """Run one step; `words` int32 on the host holds the packed batch, `num_samples` of whose samples are no padding.

        Ranks other than 0 have nothing to read.
        """
        inputs = self._upload(words, shape)
        context, ids = self._prepare(inputs, shape)
        at = segments(shape)
        rows = None if shape.samples_all else inputs[at.sample_rows]
        if rows is not None and not len(rows):
            rows = inputs[at.rows][:0]
        hidden = self._model.forward(ids, self._caches, context, rows)
        sampled = self._sample(hidden, inputs[at.sample_slots].long(), sampling) if shape.num_samples else None
        return PendingTokens(self.device, sampled, sampling, num_samples)

    def _upload(self, words: torch.Tensor, shape: BatchShape) -> torch.Tensor:
        """The batch on the device; changed block-table entries are applied to the tables."""
        at = segments(shape)
        inputs = words.to(self.device, non_blocking=True)
        if shape.num_updates:
            rows, columns, blocks = inputs[at.updates].view(-1, 3).unbind(-1)
            self._tables[rows.long(), columns.long()] = blocks
        return inputs

    def _prepare(self, inputs: torch.Tensor, shape: BatchShape) -> tuple[AttentionContext, torch.Tensor]:
        at = segments(shape)
        rows = inputs[at.rows]
        width = -(-shape.max_context_len // (self._caches[0].keys.shape[2]))
        ids = inputs[at.ids].long()
        decodes = shape.num_decodes
        if decodes:
            ids[:decodes] = self._last_tokens[rows[:decodes]]
        context = AttentionContext(
            positions=inputs[at.positions],
            slots=inputs[at.slots].view(torch.int64),
            block_tables=self._tables[rows, :width],
            query_starts=inputs[at.query_starts],
            context_lens=inputs[at.context_lens],
            max_query_len=shape.max_query_len,
            max_context_len=shape.max_context_len,
            num_decodes=decodes,
        )
        return context, ids

    def _sample(self, hidden: torch.Tensor, slots: torch.Tensor, sampling: SamplingBatch | None) -> SampledTokens | None:
        logits = self._model.logits(hidden)
        if logits is None:
            tokens = torch.empty(len(slots), dtype=torch.int64, device=self.device)
            self._last_tokens[slots] = self.parallel.broadcast(tokens)
            return None
        sampled = self._sampler(logits, sampling, slots)
        self._last_tokens[slots] = self.parallel.broadcast(sampled.tokens)
        return sampled
