"""Rank 0's side of running steps: builds the model on every rank, sizes the cache, packs batches and starts them.

Settings left to `auto` are resolved here, where the device and the checkpoint are known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gantline_kernels import api
from numpy.typing import NDArray

from gantline_runtime import sizing
from gantline_runtime.batch import BatchLimits, BatchShape, pack_batch, pack_padding
from gantline_runtime.checkpoint import Checkpoint, ModelShape
from gantline_runtime.config import EngineConfig
from gantline_runtime.device_memory import allocated_bytes, context_bytes, free_bytes
from gantline_runtime.distributed import WorkerGroup, WorkerPlan, join_group, leave_group, make_rendezvous
from gantline_runtime.errors import CapacityError, ConfigurationError
from gantline_runtime.kv_cache import CacheManager
from gantline_runtime.loader import Progress
from gantline_runtime.memory import available_cpus, resident_bytes
from gantline_runtime.model_runner import ModelRunner, PendingTokens, StepResult
from gantline_runtime.parallel import Parallel
from gantline_runtime.prompt_reads import build_read_batch
from gantline_runtime.ranks import Ranks
from gantline_runtime.sampling import SamplingTable, TokenMask
from gantline_runtime.scheduler import Step

__all__ = ["Executor", "MemoryReport"]

_HOST_RESERVE_BYTES = 768 << 20
"""Kept free on a CPU beside the cache: the API process (0.4 GiB) and activations."""
_POLL_S = 50e-6
_NUM_BUFFERS = 3
"""Batches whose copy to the device may be under way at once: one more than steps in flight, and one being written."""


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one rank: what was allocated, and what sizing.py, and so the operator, expected."""

    weight_bytes: int
    cache_bytes: int
    cache_bytes_per_token: int
    workspace_bytes: int
    """Measured with the largest steps, and reserved before the cache was sized, with the tensors of the engine itself; 0 on a CPU."""
    context_bytes: int
    """What the device holds beside this rank's tensors: CUDA, its libraries, other processes. On a CPU: what this process held beside its
    weights before the cache was sized."""
    estimated_weight_bytes: int
    estimated_workspace_bytes: int
    estimated_context_bytes: int
    estimated_cache_bytes_per_token: int


class Executor:
    """After construction `config` has no `auto` left, and every rank waits for steps."""

    def __init__(
        self,
        model_dir: Path,
        checkpoint: Checkpoint,
        config: EngineConfig,
        on_progress: Callable[[Progress], None] | None,
        ranks: Ranks | None = None,
    ) -> None:
        """`ranks`: the other ranks' processes where they have been started already."""
        report = on_progress or (lambda _: None)
        report(Progress("device", 0, 0))
        config = _resolve(config, checkpoint)
        _check_parallel(config, checkpoint)
        self.device = torch.device("cuda", 0) if config.device == "cuda" else torch.device("cpu")
        self.depth = 1 if self.device.type == "cuda" else 0
        plan = _worker_plan(model_dir, config, checkpoint.facts.max_position_embeddings)
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(plan.num_threads)
        if config.batch_invariant:
            _try_invariance(checkpoint.shape, plan.dtype, self.device, plan.backend)
        self._workers = WorkerGroup(plan, ranks) if config.tp > 1 else None
        try:
            self._load(checkpoint, config, plan, report)
        except BaseException:
            self.close()
            raise

    def _load(self, checkpoint: Checkpoint, config: EngineConfig, plan: WorkerPlan, on_progress: Callable[[Progress], None]) -> None:
        if self._workers is not None:
            self._workers.gather()
        self._parallel = join_group(plan, 0)
        build = plan.build(0)
        self._others_bytes = allocated_bytes(self.device)
        """Of this process's tensors on the GPU, what was there before this engine: an embedding program's own, or another engine's."""
        self._runner = ModelRunner(checkpoint, session_len=plan.session_len, build=build, parallel=self._parallel, on_progress=on_progress)
        self.block_bytes = self._runner.cache_block_bytes(config.block_size)
        on_progress(Progress("workspace", 0, 0))
        free = self._measure_free(config, plan)
        on_progress(Progress("cache", 0, 0))
        self.num_blocks, self.config = _size_cache(config, checkpoint, free, self.block_bytes)
        assert self.config.session_len is not None
        self.limits = _limits(self.config, self.config.session_len)
        self._allocate(plan)
        self.memory = self._report(checkpoint, plan)
        self.capture_seconds = self._runner.capture_seconds
        self.launch_seconds = self._runner.launch_seconds
        self.graph_tokens = self._runner.graph_tokens
        self._table = SamplingTable(self.limits.max_slots)
        pinned, words = self.device.type == "cuda", self.limits.max_words
        self._buffers = [torch.zeros(words, dtype=torch.int32, pin_memory=pinned) for _ in range(_NUM_BUFFERS)]
        self._next_buffer = 0

    def _measure_free(self, config: EngineConfig, plan: WorkerPlan) -> int:
        """Bytes that the cache may take of, on the rank that has the least: what is free after weights and workspace."""
        limits = _limits(config, plan.session_len)
        if self._workers is not None:
            self._workers.send((limits, config.block_size))
        self._workspace_bytes = self._runner.measure_workspace(limits, config.block_size, graphs=plan.graphs)
        self._runner.wait_loaded()
        if self.device.type == "cpu":
            self._process_bytes = max(0, resident_bytes() - self._runner.weight_bytes)
        own = free_bytes(self.device, shared_by=config.tp) - self._workspace_bytes
        return min([own, *(self._workers.gather() if self._workers is not None else ())])

    def _allocate(self, plan: WorkerPlan) -> None:
        if self._workers is not None:
            self._workers.send((self.num_blocks, self.limits))
        try:
            self._runner.allocate(self.num_blocks, self.config.block_size, self.limits, graphs=plan.graphs)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            raise CapacityError(
                f"the cache of {self.num_blocks} blocks ({self.num_blocks * self.block_bytes / 1e9:.1f} GB) cannot be allocated: {error}",
                cure="Lower cache_max_entry_count or num_cache_blocks.",
            ) from None
        if self._workers is not None:
            self._workers.gather()

    def _report(self, checkpoint: Checkpoint, plan: WorkerPlan) -> MemoryReport:
        weights, cache = self._runner.weight_bytes, self.num_blocks * self.block_bytes
        own = allocated_bytes(self.device) - self._others_bytes
        config, facts, width = self.config, checkpoint.facts, plan.dtype.itemsize
        on_gpu = self.device.type == "cuda"
        return MemoryReport(
            weight_bytes=weights,
            cache_bytes=cache,
            cache_bytes_per_token=self.block_bytes // config.block_size,
            workspace_bytes=self._workspace_bytes + own - weights - cache if on_gpu else 0,
            context_bytes=context_bytes(self.device) if on_gpu else self._process_bytes,
            estimated_weight_bytes=sizing.weight_bytes(facts, config.tp, width),
            estimated_workspace_bytes=sizing.reserved_bytes(
                facts,
                tp=config.tp,
                dtype_bytes=width,
                max_batch_size=config.max_batch_size,
                device=config.device,
                session_len=plan.session_len,
                step_tokens=config.max_prefill_token_num,
                graphs=plan.graphs,
            ),
            estimated_context_bytes=sizing.context_bytes(config.tp, config.device),
            estimated_cache_bytes_per_token=sizing.cache_bytes_per_token(facts, config.tp, width),
        )

    # ---- steps

    def launch(self, step: Step, cache: CacheManager, masks: Callable[[], TokenMask | None] | None = None) -> PendingTokens:
        """Start a step on all ranks. `masks` is called when the forward pass is launched, and sampling waits for it."""
        buffer = self._take_buffer()
        array = buffer.numpy()
        shape = pack_batch(
            array,
            step,
            tables=cache.tables,
            updates=cache.take_table_updates(),
            block_size=cache.block_size,
            groups=cache.groups,
            pad=lambda shape: self._runner.pad(shape, step.captures),
        )
        self._send(shape, array)
        sampling = self._table.batch(step)
        try:
            return self._runner.execute(buffer[: shape.num_words], shape, sampling, build_read_batch(step), masks)
        except RuntimeError:
            self._blame_dead_rank()
            raise

    def prepare(self) -> bool:
        """Capture a graph that will be of use, by a step without sequences, and wait for it; False if there is none.

        A second such step replays it: a graph's first launch takes its nodes to the device, which steps beside others need not wait for.
        """
        shape = self._runner.foresee()
        if shape is None:
            return False
        buffer = self._take_buffer()
        pack_padding(buffer.numpy(), shape, self.limits.max_slots - 1)
        for step in (shape, shape._replace(capture=0)):
            self._send(step, buffer.numpy())
            self.read(self._runner.execute(buffer[: shape.num_words], step, None))
        return True

    def _take_buffer(self) -> torch.Tensor:
        buffer = self._buffers[self._next_buffer]
        self._next_buffer = (self._next_buffer + 1) % _NUM_BUFFERS
        return buffer

    def _send(self, shape: BatchShape, words: NDArray[np.int32]) -> None:
        if self._workers is not None:
            self._workers.send_step(shape, words[: shape.num_words])

    def read(self, pending: PendingTokens) -> StepResult:
        try:
            while self._workers is not None and not pending.ready:  # a dead rank would leave us waiting in a collective for ever
                self._workers.check()
                time.sleep(_POLL_S)
            return pending.read()
        except RuntimeError:
            self._blame_dead_rank()
            raise

    @property
    def failed(self) -> bool:
        return self._workers is not None and self._workers.failure is not None

    def check(self) -> None:
        """Raise RankError if another rank has died."""
        if self._workers is not None:
            self._workers.check()

    def _blame_dead_rank(self) -> None:
        if self._workers is not None:
            self._workers.check_soon()

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
        runner = self.__dict__.pop("_runner", None)
        if runner is not None:
            runner.close()  # NCCL waits for ever for graphs that hold its communicator
        leave_group(getattr(self, "_parallel", Parallel()))


def _resolve(config: EngineConfig, checkpoint: Checkpoint) -> EngineConfig:
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "device is 'cuda', but torch sees no GPU", cure="Give --device cpu, or check the driver with `gantline check-env`."
        )
    interpreted = config.backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu" and config.backend in ("cuda", "triton") and not interpreted:
        raise ConfigurationError(f"the {config.backend} backend cannot run on a CPU", cure="Give --backend auto or torch.")
    backend = api.select(config.backend, device)
    if config.batch_invariant:
        _check_invariant(config, checkpoint, backend, device)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else checkpoint.facts.dtype  # type: ignore[assignment]
    limit = checkpoint.facts.max_position_embeddings
    if config.session_len is not None and config.session_len > limit and not _stretches(checkpoint):
        raise ConfigurationError(
            f"session_len is {config.session_len}, but the model was made for {limit} tokens", cure=f"Give at most {limit}, or auto."
        )
    return replace(config, device=device, backend=backend, dtype=dtype)  # type: ignore[arg-type]


def _check_invariant(config: EngineConfig, checkpoint: Checkpoint, backend: str, device: str) -> None:
    problems = {
        "ranks would add up in an order of their own": config.tp > 1,
        "this model runs by transformers' own implementation": checkpoint.shape.family == "transformers",
    }
    for problem, holds in problems.items():
        if holds:
            raise ConfigurationError(f"batch_invariant cannot be kept: {problem}", cure="Use tp 1 and a model of our families.")
    try:
        api.select_invariant(backend, device)
    except ValueError as error:
        raise ConfigurationError(f"batch_invariant cannot be kept: {error}", cure="Use the backend auto.") from None


def _try_invariance(shape: ModelShape, dtype: torch.dtype, device: torch.device, backend: str) -> None:
    """Raises ConfigurationError where this machine's matrix products do not keep what the mode is built on."""
    attended, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    matrices = (
        (shape.hidden_size, attended + 2 * keys),
        (attended, shape.hidden_size),
        (shape.hidden_size, 2 * shape.intermediate_size),
        (shape.intermediate_size, shape.hidden_size),
        (shape.hidden_size, shape.vocab_size),
    )
    group_size = None if shape.awq is None else shape.awq.group_size
    products = api.Products(matrices, shape.num_heads, shape.num_kv_heads, shape.head_dim, dtype, device, group_size)
    found = api.find_variance(products, backend=backend)
    if found:
        raise ConfigurationError(
            f"batch_invariant cannot be kept: on this machine, {found} depends on a row's place",
            cure="Use another dtype, or another CPU or GPU.",
        )


def _stretches(checkpoint: Checkpoint) -> bool:
    """Whether the model's position embedding goes beyond its limit by itself (dynamic NTK scaling)."""
    section = checkpoint.config.get("rope_parameters") or checkpoint.config.get("rope_scaling") or {}
    return section.get("rope_type", section.get("type")) == "dynamic"


def _check_parallel(config: EngineConfig, checkpoint: Checkpoint) -> None:
    reason = sizing.legal_tensor_parallel(checkpoint.facts, config.tp)
    if reason is not None:
        raise ConfigurationError(f"tp is {config.tp}, but {reason}", cure="Use less tensor parallelism.")
    if config.device == "cuda" and torch.cuda.device_count() < config.tp:
        raise ConfigurationError(
            f"tp is {config.tp}, but there are {torch.cuda.device_count()} GPUs", cure="Use less tensor parallelism, or more GPUs."
        )


def _worker_plan(model_dir: Path, config: EngineConfig, position_limit: int) -> WorkerPlan:
    return WorkerPlan(
        model_dir=str(model_dir),
        session_len=config.session_len or position_limit,
        dtype=getattr(torch, config.dtype),
        device_type=config.device,
        backend=api.select_invariant(config.backend, config.device) if config.batch_invariant else config.backend,
        size=config.tp,
        rendezvous=make_rendezvous() if config.tp > 1 else "",
        num_threads=max(1, available_cpus() // config.tp),
        graphs=config.device == "cuda" and config.backend != "torch" and not config.eager_mode,
    )


def _limits(config: EngineConfig, session_len: int) -> BatchLimits:
    max_blocks = -(-session_len // config.block_size)
    return BatchLimits(max_tokens=config.max_prefill_token_num, max_slots=config.max_batch_size + 1, max_blocks=max_blocks)


def _size_cache(config: EngineConfig, checkpoint: Checkpoint, free: int, block_bytes: int) -> tuple[int, EngineConfig]:
    """(blocks, settings with `session_len` resolved). Raises CapacityError if one session does not fit."""
    size, limit = config.block_size, checkpoint.facts.max_position_embeddings
    wanted = config.session_len or limit
    if config.num_cache_blocks is not None:
        num_blocks = config.num_cache_blocks
        if num_blocks * block_bytes > free:
            raise CapacityError(
                f"num_cache_blocks is {num_blocks}, {num_blocks * block_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free",
                cure="Give fewer blocks, or auto.",
            )
    else:
        share = config.cache_max_entry_count * max(0, free - (_HOST_RESERVE_BYTES if config.device == "cpu" else 0))
        num_blocks = int(share) // block_bytes
        if config.device == "cpu":  # memory is shared with others there: no more than can ever be used
            num_blocks = min(num_blocks, config.max_batch_size * -(-wanted // size))
    capacity, raised = num_blocks * size, "cache_max_entry_count" if config.num_cache_blocks is None else "num_cache_blocks"
    if capacity < (wanted if config.session_len is not None else min(wanted, sizing.MIN_SESSION_LEN)):
        raise CapacityError(
            f"the cache holds {capacity} tokens ({free / 1e9:.2f} GB free after loading), but one session needs {wanted}",
            cure=f"Lower session_len to {capacity} or less, raise {raised}, or give more memory.",
        )
    return num_blocks, replace(config, session_len=min(wanted, capacity), num_cache_blocks=num_blocks)
