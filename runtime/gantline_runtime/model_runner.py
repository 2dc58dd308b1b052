"""One rank's half of a step that touches tensors: weights, cache, per-request device state, forward pass, sampling.

`ModelRunner.execute` takes a packed batch (`batch.py`) and returns at once where the device works by itself (CUDA); what was sampled is
read later from the `PendingTokens`. Sampled tokens stay on the device in `last_tokens`, where the next step finds its inputs, so no step
waits for the host to see the one before. The forward pass, perhaps as a CUDA graph, ends at hidden states; logits and sampling are launched
by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gantline_runtime.batch import BatchShape, batch_words, segments
from gantline_runtime.checkpoint import Checkpoint
from gantline_runtime.graphs import DecodeGraphs
from gantline_runtime.layers.attention import AttentionContext, LayerCache
from gantline_runtime.layers.weights import BuildContext
from gantline_runtime.loader import Progress
from gantline_runtime.messages import PromptLogprobs, TokenLogprobs
from gantline_runtime.models import build_model
from gantline_runtime.parallel import Parallel
from gantline_runtime.prompt_reads import SCORE_ROWS, ReadBatch, ReadTensors, read_rows, split_reads
from gantline_runtime.sampling import SampledTokens, Sampler, SamplingBatch

__all__ = ["BatchLimits", "ModelRunner", "PendingTokens", "StepResult"]


_GRAPH_BYTES = 512 << 20
"""Reserved for CUDA graphs: their shared activations (about 100 MB at 512 rows of an 8B model) and what the driver keeps for each."""


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


class StepResult(NamedTuple):
    """Of each sample its token and, where asked for, its log-probabilities; of each of the step's reads what was read."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    reads: Sequence[PromptLogprobs | NDArray[np.float32]] = ()


class PendingTokens:
    """Tokens of a step on their way to the host; `read` is the one place where the host waits for the device."""

    def __init__(
        self,
        device: torch.device,
        sampled: SampledTokens | None,
        sampling: SamplingBatch | None,
        num_samples: int,
        reads: tuple[ReadBatch, ReadTensors] | None = None,
    ) -> None:
        """`sampled` None: the step samples nothing, but is waited for all the same."""
        self._sampling = sampling
        self._num_samples = num_samples
        self._reads = None if reads is None else (reads[0], ReadTensors(**{n: self._copy_out(t) for n, t in vars(reads[1]).items()}))
        self._host = None if sampled is None else SampledTokens(**{n: self._copy_out(t) for n, t in vars(sampled).items()})
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    @staticmethod
    def _copy_out(tensor: torch.Tensor | None) -> Any:
        if tensor is None or not tensor.is_cuda:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    @property
    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def read(self) -> StepResult:
        if self._event is not None:
            self._event.synchronize()
        reads = split_reads(*self._reads) if self._reads is not None else ()
        if self._host is None:
            return StepResult([], None, reads)
        return StepResult(self._host.tokens[: self._num_samples].tolist(), self._read_logprobs(self._host), reads)

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
        self.weight_bytes = self._model.load(checkpoint, on_progress)
        self._graphs: DecodeGraphs | None = None
        self.capture_seconds: list[float] = []
        """How long each CUDA graph took to capture."""

    def cache_block_bytes(self, block_size: int) -> int:
        """Bytes of one block in all layers of this rank."""
        return 2 * self._shape.num_layers * self._model.kv_heads * block_size * self._shape.head_dim * self._dtype.itemsize

    def allocate(self, num_blocks: int, block_size: int, limits: BatchLimits, *, graphs: bool) -> None:
        """The cache, in one allocation, and the per-request state. Raises torch.OutOfMemoryError or RuntimeError.

        `graphs`: batches of decodes may run as CUDA graphs.
        """
        shape = (self._shape.num_layers, 2, num_blocks, self._model.kv_heads, block_size, self._shape.head_dim)
        self._block_size = block_size
        self._caches = [LayerCache(layer[0], layer[1]) for layer in torch.empty(shape, dtype=self._dtype, device=self.device)]
        self._tables = torch.zeros((limits.max_slots, limits.max_blocks), dtype=torch.int32, device=self.device)
        self._last_tokens = torch.zeros(limits.max_slots, dtype=torch.int64, device=self.device)
        self._sampler = Sampler(max_slots=limits.max_slots, vocab_size=self._shape.vocab_size, device=self.device, backend=self._backend)
        if self.device.type == "cuda":
            words = batch_words(max_tokens=limits.max_tokens, max_sequences=limits.max_slots, max_updates=limits.max_updates)
            self._inputs = torch.zeros(words, dtype=torch.int32, device=self.device)
            self._hidden = torch.zeros((limits.max_slots, self._shape.hidden_size), dtype=self._dtype, device=self.device)
        self._graphs = None
        if graphs and self._model.capturable:
            session_len = limits.max_blocks * block_size
            self._graphs = DecodeGraphs(self._forward_decodes, max_size=limits.max_slots - 1, session_len=session_len)
            self.capture_seconds = self._graphs.capture_seconds

    def padded(self, num_sequences: int, max_context: int) -> tuple[int, int]:
        """What a batch of decodes must be padded to, sequences and context; (0, 0) for nothing."""
        return self._graphs.padded(num_sequences, max_context) if self._graphs is not None else (0, 0)

    @torch.inference_mode()
    def execute(
        self, words: torch.Tensor, shape: BatchShape, sampling: SamplingBatch | None, num_samples: int, reads: ReadBatch | None = None
    ) -> PendingTokens:
        """Run one step; `words` int32 on the host holds the packed batch, `num_samples` of whose samples are no padding.

        Ranks other than 0 have nothing to read.
        """
        inputs = self._upload(words, shape)
        at = segments(shape)
        if self._graphs is not None and shape.is_decode and self.padded(shape.num_sequences, 1)[0] == shape.num_sequences:
            self._graphs.run(shape)
            hidden = self._hidden[: shape.num_sequences]
        else:
            hidden = self._forward(inputs, shape)
        slots = inputs[at.sample_slots].long()
        sampled = self._sample(hidden[: shape.num_samples], slots, sampling) if shape.num_samples else None
        read = read_rows(hidden[shape.num_samples :], shape.num_scored, reads, self._model.logits) if shape.num_reads or reads else None
        return PendingTokens(self.device, sampled, sampling, num_samples, (reads, read) if reads is not None and read is not None else None)

    def _upload(self, words: torch.Tensor, shape: BatchShape) -> torch.Tensor:
        """The batch on the device (at the same place each time), changes of block tables applied."""
        at = segments(shape)
        inputs = words
        if self.device.type == "cuda":
            inputs = self._inputs[: len(words)].copy_(words, non_blocking=True)
        if shape.num_updates:
            self._tables.view(-1).index_copy_(0, inputs[at.update_places].view(torch.int64), inputs[at.update_blocks])
        return inputs

    def _forward_decodes(self, shape: BatchShape) -> None:
        self._hidden[: shape.num_sequences] = self._forward(self._inputs, shape)

    def _forward(self, inputs: torch.Tensor, shape: BatchShape) -> torch.Tensor:
        """Final hidden states of the rows that are sampled, then of those that are read."""
        at = segments(shape)
        rows = inputs[at.rows]
        ids = inputs[at.ids].long()
        if shape.num_decodes:
            ids[: shape.num_decodes] = self._last_tokens[rows[: shape.num_decodes]]
        width = -(-shape.max_context_len // self._block_size)
        kept = slice(at.sample_rows.start, at.read_rows.stop)
        context = AttentionContext(
            positions=inputs[at.positions],
            slots=inputs[at.slots].view(torch.int64),
            block_tables=self._tables[rows, :width],
            query_starts=inputs[at.query_starts],
            context_lens=inputs[at.context_lens],
            max_query_len=shape.max_query_len,
            max_context_len=shape.max_context_len,
            num_decodes=shape.num_decodes,
        )
        return self._model.forward(ids, self._caches, context, None if shape.samples_all else inputs[kept])

    def _sample(self, hidden: torch.Tensor, slots: torch.Tensor, sampling: SamplingBatch | None) -> SampledTokens | None:
        logits = self._model.logits(hidden)
        if logits is None:
            tokens = torch.empty(len(slots), dtype=torch.int64, device=self.device)
            self._last_tokens[slots] = self.parallel.broadcast(tokens)
            return None
        sampled = self._sampler(logits, sampling, slots, self._last_tokens)
        self._last_tokens[slots] = self.parallel.broadcast(sampled.tokens)
        return sampled

    @torch.inference_mode()
    def measure_workspace(self, limits: BatchLimits, block_size: int) -> int:
        """Bytes that the largest steps take beside weights and cache: tried with a cache of one block, which every sequence reads.

        Leaves the runner to be allocated. 0 on a CPU, whose allocations come from the pool that is left free for them.
        """
        if self.device.type != "cuda":
            return 0
        small = replace(limits, max_blocks=max(1, -(-limits.max_tokens // block_size)))
        self.allocate(1, block_size, small, graphs=False)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        for shape, words in _largest_steps(small):
            self.execute(words, shape, None, shape.num_samples).read()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del self._caches, self._tables, self._last_tokens, self._sampler, self._inputs, self._hidden
        return peak + _unmeasured_bytes(limits, self._shape.vocab_size)


def _unmeasured_bytes(limits: BatchLimits, vocab_size: int) -> int:
    """What comes later: token counts for penalties, copies of the logits that filters and log-probabilities make, captured graphs."""
    logits = max(limits.max_slots, SCORE_ROWS) * vocab_size * 4
    return Sampler.state_bytes(limits.max_slots, vocab_size) + 3 * logits + _GRAPH_BYTES


def _largest_steps(limits: BatchLimits) -> Iterator[tuple[BatchShape, torch.Tensor]]:
    """Batches that take the most memory: one long prompt; prompts that all end, so that all are sampled; every sequence decoding."""
    sequences = min(limits.max_slots - 1, limits.max_tokens)
    for count in (1, sequences):
        lens = np.full(count, limits.max_tokens // count, dtype=np.int32)
        yield _dummy_batch(lens, limits)
    yield _dummy_batch(np.ones(sequences, dtype=np.int32), limits)


def _dummy_batch(lens: NDArray[np.int32], limits: BatchLimits) -> tuple[BatchShape, torch.Tensor]:
    """Prompts of `lens` tokens, all token 0, that write nowhere and read block 0."""
    count, tokens, longest = len(lens), int(lens.sum()), int(lens.max())
    shape = BatchShape(tokens, count, count if longest == 1 else 0, count, 0, longest, longest)
    words = torch.zeros(batch_words(max_tokens=tokens, max_sequences=count, max_updates=0), dtype=torch.int32)
    at, array = segments(shape), words.numpy()
    array[at.slots].view(np.int64)[:] = -1
    array[at.query_starts][1:] = np.cumsum(lens)
    array[at.context_lens] = lens
    array[at.rows] = np.arange(count)
    array[at.sample_rows] = np.cumsum(lens) - 1
    array[at.sample_slots] = np.arange(count)
    return shape, words[: shape.num_words]
