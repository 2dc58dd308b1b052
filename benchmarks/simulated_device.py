"""A device of known cost and a clock of its own: what the engine's loop does to those who decode, without a GPU.

Everything that the host decides is the engine's own (scheduling, pacing, which batches run as CUDA graphs and when these are captured);
how long the device and the host's launches take is said here. The device runs one step after the other. The host launches a step while
the device runs the one before, and sees its end late if the launch lasts longer.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from typing import Any

from gantline_runtime.batch import BatchLimits, BatchShape
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine_loop import EngineLoop
from gantline_runtime.executor import MemoryReport
from gantline_runtime.graph_classes import GraphClasses
from gantline_runtime.graph_plan import GraphPlan
from gantline_runtime.graph_sizes import token_sizes
from gantline_runtime.kv_cache import CacheManager
from gantline_runtime.pacing import StepLoad
from gantline_runtime.scheduler import Step

__all__ = ["VOCAB", "Host", "Machine", "MeasuredAttention", "MeasuredProducts", "SimulatedExecutor", "simulated_engine"]

VOCAB = 997


class Machine:
    """What a step costs, in seconds, with up to `noise` of it more or less. The default is an 8B model on a large GPU."""

    def __init__(self, *, base: float = 5e-3, mixed: float = 3e-3, token: float = 21e-6, pair: float = 0.4e-9, noise: float = 0.02) -> None:
        self.base, self.mixed, self.token, self.pair, self.noise = base, mixed, token, pair, noise
        self.random = random.Random(1)

    decode = 15e-6
    """For one more row, its context aside."""

    def seconds(self, load: StepLoad) -> float:
        prompt = self.mixed * (load.prompt_tokens > 0) + self.token * load.prompt_tokens + self.pair * load.pairs
        decoding = self.decode * load.decodes + 35e-9 * load.decode_context
        return (self.base + prompt + decoding) * (1 + self.noise * self.random.uniform(-1, 1))


class MeasuredAttention(Machine):
    """Attention over the prefix takes what it was measured to take in 32 layers of an 8B model on an H100 (`benchmarks.kernels`, group
    `chunk`): reading the keys, or computing, and some 15 us."""

    def seconds(self, load: StepLoad) -> float:
        if not load.prompt_tokens:
            return super().seconds(load)
        prefix = load.pairs / load.prompt_tokens / 30_000
        whole = 380e-6 * prefix * math.ceil(load.prompt_tokens / 512)
        split = max(24e-6 + 40e-6 * prefix, 15e-6 + 0.82e-6 * load.prompt_tokens * prefix)
        return super().seconds(load) + 32 * self.layer(whole, split)

    def layer(self, whole: float, split: float) -> float:
        return min(whole, split)


class MeasuredProducts(MeasuredAttention):
    """Matrix products too about as measured in 32 layers of an 8B model on an H100 (docs/perf-log.md, "Linear layers"): whole tiles of 128
    rows, so that one token more may cost what 128 do. Contexts of those that decode are read at 3.1 TB/s."""

    beside = 1.4e-3
    """Decodes beside a chunk, whose contexts are bounded by its own (measured with 128 tokens and 64 decodes), and norms."""

    def __init__(self, noise: float = 0.01) -> None:
        super().__init__(noise=noise)

    def seconds(self, load: StepLoad) -> float:
        tokens = load.decodes + load.prompt_tokens
        step = 0.8e-3 + self.products(tokens) + 42e-9 * load.decode_context
        if load.prompt_tokens:
            chunk, prefix = load.prompt_tokens, load.pairs / load.prompt_tokens / 30_000
            step += self.beside + 32 * max(24e-6 + 40e-6 * prefix, 15e-6 + 25e-6 * math.ceil(chunk / 32) * prefix)
        return step * (1 + self.noise * self.random.gauss(0, 1))

    @staticmethod
    def products(tokens: int) -> float:
        tiles = math.ceil(tokens / 128)
        return 5.4e-3 if tokens <= 64 else {1: 5.8e-3, 2: 6.5e-3, 3: 9.0e-3, 4: 10.5e-3}.get(tiles, 2.4e-3 * tiles)


@dataclass(frozen=True)
class Host:
    """Seconds of the host's own work: of one step, launched as one graph; what launching it kernel by kernel adds; what a capture adds; and
    what the first run of a number of tokens adds, which loads kernels and waits for the device."""

    step: float = 0.5e-3
    eager: float = 0.0
    capture: float = 0.0
    first: float = 0.0


class SimulatedExecutor:
    """Keeps a clock instead of a cache; every token is 1."""

    def __init__(self, config: EngineConfig, machine: Machine, host: Host, *, graphs: bool) -> None:
        assert config.session_len is not None and config.num_cache_blocks is not None
        self.config = config
        self.depth = 1
        self.num_blocks = config.num_cache_blocks
        self.limits = BatchLimits(config.max_prefill_token_num, config.max_batch_size + 1, -(-config.session_len // config.block_size))
        self.memory = MemoryReport(0, 0, 0, 0, 0, 0, 0, 0, 0)
        self.failed = False
        self.machine, self.host = machine, host
        self.now = self.busy_until = 0.0
        self.steps: list[Step] = []
        self.capture_seconds: list[float] = []
        self.launch_seconds: deque[float] = deque(maxlen=9)
        sizes = {"max_sequences": config.max_batch_size, "max_tokens": config.max_prefill_token_num, "session_len": config.session_len}
        self._plan = GraphPlan(GraphClasses(**sizes)) if graphs else None
        self.graph_tokens = self._plan.mixed_tokens if self._plan is not None else set()
        self._graphs: set[BatchShape] = set()
        self._warm: set[BatchShape] = set()
        self._sizes = token_sizes(config.max_prefill_token_num)
        self._seen: set[int] = set()

    def launch(self, step: Step, cache: CacheManager, masks: Any = None) -> Any:
        cache.take_table_updates()
        self.now += self.host.step
        exact = _shape_of(step)
        shape = exact if self._plan is None else self._plan.pad(exact, step.captures)
        padding = (shape.num_tokens - exact.num_tokens) * (self.machine.token if step.load.prompt_tokens else self.machine.decode)
        self._run(shape, self.machine.seconds(step.load) + padding)
        self.steps.append(step)
        return step, self.busy_until

    def read(self, pending: Any) -> Any:
        step, done = pending
        self.now = max(self.now, done)
        return [1] * len(step.samples), None, []

    def prepare(self) -> bool:
        shape = None if self._plan is None else self._plan.foresee()
        if shape is None:
            return False
        self._run(shape, self.machine.base)
        self.now = max(self.now, self.busy_until)
        return True

    def check(self) -> None: ...

    def close(self) -> None: ...

    def _run(self, shape: BatchShape, seconds: float) -> None:
        """As `StepGraphs.run` and, of what has no class, `ModelRunner.execute` do."""
        key, size = shape.graph, bisect_left(self._sizes, shape.num_tokens)
        if self.host.first and size not in self._seen:
            self._seen.add(size)
            self.now = max(self.now, self.busy_until) + self.host.first
        if shape.capture and (key in self._warm or (self._plan is not None and self._plan.is_wide(key))):
            self._capture(key)
        begins = max(self.now, self.busy_until)
        self.busy_until = begins + seconds
        if key not in self._graphs:
            self.now += self.host.eager
            self.launch_seconds.append(self.host.eager)
            self.busy_until = max(self.busy_until, self.now)
            if shape.capture and key not in self._warm:
                self._capture(key)
            self._warm.add(key)

    def _capture(self, key: BatchShape) -> None:
        assert self._plan is not None
        self.now += self.host.capture
        self.capture_seconds.append(self.host.capture)
        self._graphs.add(key)
        self._plan.captured(key)


def simulated_engine(
    machine: Machine, host: Host | None = None, *, graphs: bool = False, **settings: Any
) -> tuple[EngineLoop, SimulatedExecutor]:
    """`graphs`: batches that have a class run as graphs once these are captured; else all launches take the host as long."""
    defaults: dict[str, Any] = {"session_len": 40_000, "num_cache_blocks": 8192, "block_size": 64, "max_batch_size": 128}
    executor = SimulatedExecutor(EngineConfig(**{**defaults, **settings}), machine, host or Host(), graphs=graphs)
    return EngineLoop(executor, vocab_size=VOCAB, eos_token_ids=(7,), clock=lambda: executor.now), executor


def _shape_of(step: Step) -> BatchShape:
    contexts = [start + count for start, count in zip(step.starts, step.query_lens, strict=True)]
    return BatchShape(step.num_tokens, len(step.sequences), step.num_decodes, len(step.samples), 0, max(step.query_lens), max(contexts))
