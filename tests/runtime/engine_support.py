"""What the engine's tests share: a model that costs nothing but reads its cache honestly, and small random checkpoints."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from gantline_runtime.batch import BatchLimits, BatchShape, pack_batch, segments
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine_loop import EngineLoop
from gantline_runtime.executor import MemoryReport
from gantline_runtime.graph_classes import GraphClasses
from gantline_runtime.kv_cache import CacheManager
from gantline_runtime.messages import EngineRequest, PromptLogprobs, SamplingParams, TokenOutput
from gantline_runtime.model_runner import StepResult
from gantline_runtime.prompt_reads import ReadBatch, build_read_batch
from gantline_runtime.sampling import TokenMask
from gantline_runtime.scheduler import Step

VOCAB = 997
Words = np.ndarray[Any, np.dtype[np.int32]]
EOS = 7


def next_token(context: Iterable[int]) -> int:
    """The fake model: depends on every token of the context and on its place."""
    return zlib.crc32(array("q", context).tobytes()) % VOCAB


def next_allowed(token: int, bits: Words | None) -> int:
    """The first token from `token` on that a mask allows."""
    if bits is None:
        return token
    allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[:VOCAB])
    return int(allowed[np.searchsorted(allowed, token) % len(allowed)])


def fake_logprob(context: Iterable[int], token: int) -> float:
    """The fake model's log-probability of `token` after `context`."""
    return -float((next_token(context) + token) % 101)


def fake_hidden(context: Iterable[int]) -> float:
    """The fake model's hidden state, of one number."""
    return float(next_token(context) % 10)


def expected_tokens(prompt: list[int], count: int, *, stop: frozenset[int] = frozenset(), min_tokens: int = 0) -> list[int]:
    tokens = list(prompt)
    for i in range(count):
        tokens.append(next_token(tokens))
        if tokens[-1] in stop and i >= min_tokens:
            break
    return tokens[len(prompt) :]


class FakeExecutor:
    """Runs packed batches as a device would, late and in order: applies table updates, writes tokens to the slots of its cache, and
    reads each sequence's context back through its block table. A step runs when it is read, or when a later one is launched past
    `depth`, so whatever the host changes too early is seen."""

    def __init__(self, config: EngineConfig, *, depth: int = 1, padded: bool = False) -> None:
        """`padded`: batches are padded to the classes of CUDA graphs."""
        assert config.session_len is not None and config.num_cache_blocks is not None
        self.config = config
        self.depth = depth
        self.num_blocks = config.num_cache_blocks
        max_blocks = -(-config.session_len // config.block_size)
        self.limits = BatchLimits(max_tokens=config.max_prefill_token_num, max_slots=config.max_batch_size + 1, max_blocks=max_blocks)
        self.memory = MemoryReport(0, 0, 0, 0, 0, 0, 0, 0, 0)
        self.failed = False
        self.capture_seconds: list[float] = []
        self.graph_tokens = ()
        self.launch_seconds: list[float] = []
        self.closed = False
        classes = GraphClasses(max_sequences=config.max_batch_size, max_tokens=config.max_prefill_token_num, session_len=config.session_len)
        self._pad = classes.pad if padded else None
        self._buffer = np.full(self.limits.max_words, 1 << 30, dtype=np.int32)
        self._tables = np.zeros((self.limits.max_slots, max_blocks), dtype=np.int32)
        self._last = np.zeros(self.limits.max_slots, dtype=np.int64)
        self._cache = np.full(self.num_blocks * config.block_size, -1, dtype=np.int64)
        self._launched: list[tuple[BatchShape, Words, dict[int, Words], StepResult, ReadBatch | None]] = []
        self.steps: list[Step] = []
        self.num_grouped = 0
        """Queries that were attended over a prefix shared with others."""

    def launch(self, step: Step, cache: CacheManager, masks: Callable[[], TokenMask | None] | None = None) -> Any:
        shape = pack_batch(
            self._buffer,
            step,
            tables=cache.tables,
            updates=cache.take_table_updates(),
            block_size=cache.block_size,
            groups=cache.groups,
            pad=self._pad,
        )
        result = StepResult([], None, [])
        mask = masks() if masks is not None else None
        allowed = {} if mask is None else dict(zip(mask.rows.tolist(), mask.allowed.numpy().copy(), strict=True))
        self._launched.append((shape, self._buffer[: shape.num_words].copy(), allowed, result, build_read_batch(step)))
        self.steps.append(step)
        assert len(self._launched) <= self.depth + 1, "more steps in flight than the depth allows"
        return result

    def read(self, pending: StepResult) -> StepResult:
        while self._launched:
            shape, words, allowed, result, reads = self._launched.pop(0)
            self._run(shape, words, allowed, result.tokens)
            if reads is not None:
                self._read_prompts(shape, words, reads, result.reads)
            if result is pending:
                break
        return pending

    def _read_prompts(self, shape: BatchShape, words: np.ndarray[Any, np.dtype[np.int32]], batch: ReadBatch, out: Any) -> None:
        """As the device would: from the rows that the packed batch names, and the targets that travel beside it."""
        at, size = segments(shape), self.config.block_size
        contexts = []
        for row in words[at.read_rows].tolist():
            owner = int(np.searchsorted(words[at.query_starts], row, side="right")) - 1
            blocks = self._tables[words[at.rows][owner]]
            contexts.append(self._cache.reshape(-1, size)[blocks].reshape(-1)[: words[at.positions][row] + 1].tolist())
        scores = [fake_logprob(context, int(token)) for context, token in zip(contexts, batch.targets, strict=False)]
        assert len(batch.targets) == shape.num_scored
        first = 0
        for read in batch.reads:
            rows = contexts[first : first + read.count]
            if read.sequence.pooling is None:
                out.append(
                    PromptLogprobs(
                        read.start + 1, scores[first : first + read.count], [[]] * read.count, [[]] * read.count, [1] * read.count
                    )
                )
            else:
                out.append(np.array([sum(map(fake_hidden, rows))], dtype=np.float32))
            first += read.count
        assert first == shape.num_reads

    def _run(self, shape: BatchShape, words: Words, allowed: dict[int, Words], result: list[int]) -> None:
        at, size = segments(shape), self.config.block_size
        self._tables.reshape(-1)[words[at.update_places].copy().view(np.int64)] = words[at.update_blocks]
        rows, ids, starts = words[at.rows], words[at.ids].astype(np.int64), words[at.query_starts]
        ids = np.where(ids < 0, self._last[np.maximum(~ids, 0)], ids)
        slots = words[at.slots].copy().view(np.int64)
        self._cache[slots[slots >= 0]] = ids[slots >= 0]
        assert (slots[: starts[-1]] >= 0).all() and (slots[starts[-1] :] == -1).all(), "padding must write nowhere, all else somewhere"
        assert int(words[at.context_lens].max()) <= shape.max_context_len and int(np.diff(starts).max()) <= shape.max_query_len
        assert (np.diff(starts)[: shape.num_decodes] <= 1).all() and starts[shape.num_decodes] <= shape.num_decodes
        leaders = self._leaders(shape, words)
        samples = slice(0, shape.num_samples)
        sampled = dict(zip(words[at.sample_rows][samples].tolist(), words[at.sample_slots][samples].tolist(), strict=True))
        for i, row in enumerate(rows.tolist()):
            length, last = int(words[at.context_lens][i]), int(starts[i + 1]) - 1
            if row == self.limits.max_slots - 1:
                assert length == 0 and starts[i + 1] == starts[i], "padding has neither tokens nor context"
                continue
            assert words[at.positions][last] == length - 1
            if last in sampled:
                assert sampled[last] == row
                blocks = self._tables[row, : -(-length // size)].copy()
                if i in leaders:
                    leader, shared = leaders[i]
                    blocks[: shared // size] = self._tables[rows[leader], : shared // size]
                context = self._cache.reshape(-1, size)[blocks].reshape(-1)[:length].tolist()
                self._last[row] = next_allowed(next_token(context), allowed.get(len(result)))
                result.append(int(self._last[row]))

    def _leaders(self, shape: BatchShape, words: np.ndarray[Any, np.dtype[np.int32]]) -> dict[int, tuple[int, int]]:
        """Of each sequence in a group the one whose table is read for all, and the tokens that they share."""
        if not shape.max_own_len:
            return {}
        at, leaders = segments(shape), {}
        lens, members, starts = words[at.shared_lens], words[at.shared_members], words[at.shared_starts]
        assert (words[at.context_lens][: shape.num_decodes] - lens <= shape.max_own_len).all() and starts[0] == 0
        for start, end in pairwise(starts.tolist()):
            for member in members[start:end].tolist():
                assert lens[member] == lens[members[start]] < words[at.context_lens][member]
                leaders[member] = int(members[start]), int(lens[member])
        assert sorted(leaders) == np.flatnonzero(lens).tolist()
        self.num_grouped += len(leaders)
        return leaders

    def prepare(self) -> bool:
        return False

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def fake_engine(*, depth: int = 1, padded: bool = False, **settings: Any) -> tuple[EngineLoop, FakeExecutor]:
    defaults: dict[str, Any] = {
        "session_len": 256,
        "num_cache_blocks": 64,
        "block_size": 16,
        "max_batch_size": 8,
        "max_prefill_token_num": 64,
        "max_step_ms": 0.0,
    }
    executor = FakeExecutor(EngineConfig(**{**defaults, **settings}), depth=depth, padded=padded)
    return EngineLoop(executor, vocab_size=VOCAB, eos_token_ids=(EOS,)), executor


def request(name: str, prompt: list[int], count: int = 16, **sampling: Any) -> EngineRequest:
    params = SamplingParams(**{"max_new_tokens": count, "temperature": 0.0, "ignore_eos": True, **sampling})
    return EngineRequest(request_id=name, prompt_ids=prompt, sampling=params)


def drain(engine: EngineLoop, *, checked: bool = True) -> dict[str, list[TokenOutput]]:
    """Step until nothing is left; integrity is checked after every step."""
    outputs: dict[str, list[TokenOutput]] = {}
    for _ in range(100_000):
        if not engine.has_work():
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        if checked:
            engine.check_integrity()
    raise AssertionError("the engine does not come to an end")


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
