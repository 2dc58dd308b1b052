"""One rank's half of a step that touches tensors: weights, cache, per-request device state, forward pass, sampling.

`ModelRunner.execute` takes a packed batch (`batch.py`) and returns at once where the device works by itself (CUDA); what was sampled is
read later from the `PendingTokens`. Sampled tokens stay on the device in `last_tokens`, where the next step finds its inputs, so no step
waits for the host to see the one before. The forward pass, perhaps as a CUDA graph, ends at hidden states; logits and sampling are launched
by themselves.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from gantline_kernels.api import SharedPrefixes
from gantline_kernels.devices import num_sms
from numpy.typing import NDArray

from gantline_runtime.batch import BatchLimits, BatchShape, segments
from gantline_runtime.capture_pacing import Captures
from gantline_runtime.checkpoint import Checkpoint
from gantline_runtime.graph_classes import GraphClasses
from gantline_runtime.graph_plan import GraphPlan
from gantline_runtime.graphs import StepGraphs, take_product_workspace
from gantline_runtime.layers.attention import AttentionContext, LayerCache
from gantline_runtime.layers.weights import BuildContext
from gantline_runtime.loader import Loaded, Loading, Progress
from gantline_runtime.messages import PromptLogprobs, TokenLogprobs
from gantline_runtime.models import build_model
from gantline_runtime.parallel import Parallel
from gantline_runtime.prompt_reads import ReadBatch, ReadTensors, read_rows, split_reads
from gantline_runtime.sampling import SampledTokens, Sampler, SamplingBatch, TokenMask
from gantline_runtime.serving_batches import SAMPLINGS, attention_variant, loading_batches, prompt_batch, sample_sizes
from gantline_runtime.sizing import GRAPH_POOL_SLACK
from gantline_runtime.workspace import largest_steps, unmeasured_bytes

__all__ = ["ModelRunner", "PendingTokens", "StepResult"]

_LAUNCHES = 9
"""Of which the median is taken: those that compiled a kernel are among them."""
_LOADED_SAMPLINGS = ("greedy", "masked", "drawn", "limited")
_ALL_SAMPLED = (1, 2, 24)
"""Rows with which each way of sampling is loaded: one, few, many to the kernels of logits."""


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
        *,
        max_samples: int = 0,
    ) -> None:
        """`sampled` None: the step samples nothing, but is waited for all the same. `max_samples` of any step: with as much memory for
        each, none is taken when there is one sample more than ever, for which the device would be waited for."""
        self._sampling = sampling
        self._num_samples = num_samples
        self._reads = None if reads is None else (reads[0], ReadTensors(**{n: self._copy_out(t) for n, t in vars(reads[1]).items()}))
        self._host = None if sampled is None else SampledTokens(**{n: self._copy_out(t, max_samples) for n, t in vars(sampled).items()})
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    @staticmethod
    def _copy_out(tensor: torch.Tensor | None, most_rows: int = 0) -> Any:
        if tensor is None or not tensor.is_cuda:
            return tensor
        rows, *width = tensor.shape
        host = torch.empty((max(rows, most_rows), *width), dtype=tensor.dtype, pin_memory=True)
        return host[:rows].copy_(tensor, non_blocking=True)

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
        load: bool = True,
    ) -> None:
        """Has the weights loaded, on a GPU until `wait_loaded`, unless `load` is false: then they are whatever they are. `session_len`
        bounds positions; the cache follows with `allocate`. Raises CheckpointError."""
        self.device = build.device
        self.parallel = parallel
        self._dtype = build.dtype
        self._backend = build.backend
        self._shape = checkpoint.shape
        self._model = build_model(checkpoint, session_len=session_len, parallel=parallel, build=build)
        self._loading: Loading = self._model.start_loading(checkpoint, on_progress) if load else Loaded(0)
        self.weight_bytes = 0
        if self.device.type == "cpu":
            self.wait_loaded()
        self._graphs: StepGraphs | None = None
        self._graph_pool_bytes = 0
        self.capture_seconds: list[float] = []
        """How long each CUDA graph took to capture."""
        self.graph_tokens: Collection[int] = ()
        """`GraphPlan.mixed_tokens`."""
        self.launch_seconds: deque[float] = deque(maxlen=_LAUNCHES)
        """How long the host launched the last forward passes without a graph."""

    def wait_loaded(self) -> None:
        """Until all weights are there. Raises CheckpointError."""
        self.weight_bytes = self._loading.wait()
        self._loading = Loaded(self.weight_bytes)

    def cache_block_bytes(self, block_size: int) -> int:
        """Bytes of one block in all layers of this rank."""
        return 2 * self._shape.num_layers * self._model.kv_heads * block_size * self._shape.head_dim * self._dtype.itemsize

    def allocate(self, num_blocks: int, block_size: int, limits: BatchLimits, *, graphs: bool) -> None:
        """The cache, in one allocation, and the per-request state. Raises torch.OutOfMemoryError or RuntimeError.

        `graphs`: batches that have a class may run as CUDA graphs.
        """
        shape = (self._shape.num_layers, 2, num_blocks, self._model.kv_heads, block_size, self._shape.head_dim)
        self._block_size = block_size
        self._caches = [LayerCache(layer[0], layer[1]) for layer in torch.empty(shape, dtype=self._dtype, device=self.device)]
        self._tables = torch.zeros((limits.max_slots, limits.max_blocks), dtype=torch.int32, device=self.device)
        self._last_tokens = torch.zeros(limits.max_slots, dtype=torch.int64, device=self.device)
        self._sampler = Sampler(max_slots=limits.max_slots, vocab_size=self._shape.vocab_size, device=self.device, backend=self._backend)
        self._inputs = torch.zeros(limits.max_words, dtype=torch.int32, device=self.device)
        self._hidden = torch.zeros((limits.max_sequences, self._shape.hidden_size), dtype=self._dtype, device=self.device)
        self._graphs = None
        if graphs and self._model.capturable:
            self._graphs = StepGraphs(
                self._forward_padded,
                GraphPlan(_graph_classes(limits, block_size)),
                device=self.device,
                pool_bytes=self._graph_pool_bytes,
                launch_seconds=self.launch_seconds,
                direct=self.parallel.size == 1,  # a collective connects ranks when it first runs
            )
            self.capture_seconds = self._graphs.capture_seconds
            self.graph_tokens = self._graphs.plan.mixed_tokens
            self._take_activations(limits, block_size)

    def close(self) -> None:
        """Load no more, and give up the CUDA graphs, and with them their hold on the ranks' communicator; no step may run afterwards."""
        self._loading.cancel()
        if self._graphs is not None:
            self._graphs.release()
            self._graphs = None

    def pad(self, shape: BatchShape, captures: Captures) -> BatchShape:
        """What a batch is to be padded to before it is packed; its own shape for nothing."""
        return self._graphs.plan.pad(shape, captures) if self._graphs is not None else shape

    def foresee(self) -> BatchShape | None:
        """A batch without sequences that is worth running while there is nothing else to do: its class is captured. None for nothing."""
        return self._graphs.plan.foresee() if self._graphs is not None else None

    @torch.inference_mode()
    def execute(
        self,
        words: torch.Tensor,
        shape: BatchShape,
        sampling: SamplingBatch | None,
        reads: ReadBatch | None = None,
        masks: Callable[[], TokenMask | None] | None = None,
    ) -> PendingTokens:
        """Run one step; `words` int32 on the host holds the packed batch.

        `masks` is called between the launches of the forward pass and of sampling: it may wait for earlier steps and take its time, while
        the device runs the forward pass. Ranks other than 0 have nothing to read, and need no masks: rank 0 samples for all.
        """
        inputs = self._upload(words, shape)
        if shape.padded and self._graphs is not None:
            self._graphs.run(shape)
            hidden = self._hidden
        else:
            started = time.perf_counter()
            hidden = self._forward(inputs, shape)
            self.launch_seconds.append(time.perf_counter() - started)
        mask = masks() if masks is not None else None
        if mask is not None:
            sampling = replace(sampling or SamplingBatch(), mask=mask)
        slots = inputs[segments(shape).sample_slots][: shape.num_samples].long()
        sampled = self._sample(hidden[: shape.num_samples], slots, sampling) if shape.num_samples else None
        read = None
        if shape.num_reads or reads:
            read = read_rows(hidden[shape.num_samples :], shape.num_scored, reads, self._model.logits, backend=self._backend)
        both = (reads, read) if reads is not None and read is not None else None
        return PendingTokens(self.device, sampled, sampling, shape.num_samples, both, max_samples=len(self._last_tokens))

    def _upload(self, words: torch.Tensor, shape: BatchShape) -> torch.Tensor:
        """The batch on the device (at the same place each time), changes of block tables applied."""
        at = segments(shape)
        inputs = self._inputs[: len(words)].copy_(words, non_blocking=True)
        if shape.num_updates:
            self._tables.view(-1).index_copy_(0, inputs[at.update_places].view(torch.int64), inputs[at.update_blocks])
        return inputs

    def _forward_padded(self, shape: BatchShape) -> None:
        self._hidden[: shape.num_sample_rows] = self._forward(self._inputs, shape)

    def _forward(self, inputs: torch.Tensor, shape: BatchShape) -> torch.Tensor:
        """Final hidden states of the rows that may be sampled, then of those that are read."""
        return self._model.forward(*self._model_inputs(inputs, shape))

    def _model_inputs(
        self, inputs: torch.Tensor, shape: BatchShape
    ) -> tuple[torch.Tensor, list[LayerCache], AttentionContext, torch.Tensor | None]:
        at = segments(shape)
        rows, ids = inputs[at.rows], inputs[at.ids].long()
        if shape.num_decodes:
            ids = torch.where(ids < 0, self._last_tokens[(~ids).clamp(min=0)], ids)
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
            shared=_shared_prefixes(inputs, shape),
        )
        return ids, self._caches, context, None if shape.is_decode else inputs[kept]

    def _sample(self, hidden: torch.Tensor, slots: torch.Tensor, sampling: SamplingBatch | None) -> SampledTokens | None:
        logits = self._model.logits(hidden)
        if logits is None:
            tokens = torch.empty(len(slots), dtype=torch.int64, device=self.device)
            self._last_tokens[slots] = self.parallel.broadcast(tokens)
            return None
        sampled = self._sampler(logits, sampling, slots, self._last_tokens)
        self._last_tokens[slots] = self.parallel.broadcast(sampled.tokens)
        return sampled

    def measure_workspace(self, limits: BatchLimits, block_size: int, *, graphs: bool) -> int:
        """Bytes that steps take beside weights and cache. Tried with a cache of one block, which every sequence reads: the largest steps,
        and, if there are to be `graphs`, the largest of these. Weights may still be on their way.

        Leaves the runner to be allocated. 0 on a CPU, whose allocations come from the pool that is left free for them.
        """
        if self.device.type != "cuda":
            return 0
        self.allocate(1, block_size, limits, graphs=False)
        take_product_workspace(self.device)
        graphs = graphs and self._model.capturable
        if graphs:
            self.load_kernels(limits, block_size)
        else:
            self._model.logits(self._hidden[:64])
        measured = self._peak_bytes(lambda: self._run_largest(limits, block_size))
        if graphs:
            largest = self._peak_bytes(lambda: self._run_largest_classes(limits, block_size))
            self._graph_pool_bytes = int(GRAPH_POOL_SLACK * largest)
        del self._caches, self._tables, self._last_tokens, self._sampler, self._inputs, self._hidden
        layers = self._shape.num_layers if graphs else 0
        return measured + self._graph_pool_bytes + unmeasured_bytes(limits, self._shape.vocab_size, graph_layers=layers)

    @torch.inference_mode()
    def load_kernels(self, limits: BatchLimits, block_size: int) -> None:
        """Launch every kernel that steps will launch, as far as can be foreseen, with batches of padding: a kernel is loaded when it first
        runs, and the device's work must end for that. Penalties and log-probabilities are left to those who ask for them first."""
        self._inputs.zero_()
        self._tables.view(-1).index_copy_(0, self._inputs[:2].view(torch.int64), self._inputs[:1])
        sizes = (self._shape, self.parallel.size, self._dtype.itemsize, block_size, num_sms(self.device.index))
        classes = _graph_classes(limits, block_size)
        for shape in loading_batches(classes, limits, block_size, lambda shape: attention_variant(*sizes, shape)):
            self._model.load_kernels(*self._model_inputs(self._inputs, shape)[:3])
        for rows in sample_sizes(limits):
            for kind in _LOADED_SAMPLINGS if rows in _ALL_SAMPLED else _LOADED_SAMPLINGS[:1]:
                slots = torch.arange(rows, device=self.device)
                self._sample(self._hidden[:rows], slots, SAMPLINGS[kind](rows, self._shape.vocab_size))

    @torch.inference_mode()
    def _take_activations(self, limits: BatchLimits, block_size: int) -> None:
        """Have torch's allocator hold what steps without a graph take: taken from the device by those steps, it would delay them."""
        self._inputs.zero_()
        largest = prompt_batch(1, limits.max_tokens, limits.max_blocks * block_size)
        self._model.load_kernels(*self._model_inputs(self._inputs, largest)[:3])
        self._model.logits(self._hidden[: min(limits.max_slots - 1, limits.max_tokens)])

    def _run_largest(self, limits: BatchLimits, block_size: int) -> None:
        for shape, words in largest_steps(limits, limits.max_blocks * block_size):
            self._run_briefly(shape, words)

    def _run_briefly(self, shape: BatchShape, words: torch.Tensor) -> None:
        """A step that takes as much memory as one by `execute`, through few layers. What it samples means nothing."""
        inputs = self._upload(words, shape)
        hidden = self._model.forward_briefly(*self._model_inputs(inputs, shape))
        self._sample(hidden, inputs[segments(shape).sample_slots].long(), None)

    def _run_largest_classes(self, limits: BatchLimits, block_size: int) -> None:
        self._inputs.zero_()  # a batch of padding alone
        for shape in _graph_classes(limits, block_size).largest():
            self._hidden[: shape.num_sample_rows] = self._model.forward_briefly(*self._model_inputs(self._inputs, shape))

    @torch.inference_mode()
    def _peak_bytes(self, run: Callable[[], object]) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def _shared_prefixes(inputs: torch.Tensor, shape: BatchShape) -> SharedPrefixes | None:
    if not shape.max_own_len:
        return None
    at = segments(shape)
    return SharedPrefixes(inputs[at.shared_lens], inputs[at.shared_members], inputs[at.shared_starts], shape.max_own_len)


def _graph_classes(limits: BatchLimits, block_size: int) -> GraphClasses:
    return GraphClasses(max_sequences=limits.max_slots - 1, max_tokens=limits.max_tokens, session_len=limits.max_blocks * block_size)
