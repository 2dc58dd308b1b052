"""Which tokens the next step computes. All policy is on this page.

One token budget a step. Sequences that decode come first, one token each; what is left of the budget goes to chunks of prompts, in
the order of admission, cut so that the step takes no longer than those that decode should wait (`pacing.py`). Who is admitted next is
said in `waiting.py`, who may wait at all in `admission.py`. A sequence is admitted when the cache has blocks for all its tokens and one
more for each that runs. When a decoding sequence needs a block and none is free, a running sequence is preempted: one of the lowest
priority, of those the cheapest to compute again; never the oldest, so that something always finishes.

Steps overlap: `schedule` may be called while the results of earlier steps are outstanding, and `postprocess` takes results in the
order of their steps. Blocks of a sequence are released only when no step in flight includes it.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gantline_runtime.admission import Admission
from gantline_runtime.capture_pacing import Captures
from gantline_runtime.kv_cache import CacheManager
from gantline_runtime.messages import ErrorCode, PromptLogprobs, TokenLogprobs, TokenOutput
from gantline_runtime.pacing import Pacer, StepLoad
from gantline_runtime.request import RequestRejected, Sequence
from gantline_runtime.waiting import WaitingQueue

__all__ = ["PromptRead", "Scheduler", "Step"]


@dataclass(slots=True)
class PromptRead:
    """Rows of a chunk that are read beside sampling: those of `count` tokens of `sequence` from position `start`, which are rows
    `row` and following of the step. `ends`: the request wants nothing after that."""

    sequence: Sequence
    start: int
    count: int
    row: int
    ends: bool


@dataclass(slots=True)
class Step:
    """Work of one forward pass: `query_lens[i]` tokens of `sequences[i]` from position `starts[i]`; the first `num_decodes` sequences
    have one token, which an earlier step sampled. `samples` are the sequences whose next token is sampled, `sample_rows` their rows.
    `reads`: first those whose log-probabilities are wanted, then those that are pooled."""

    sequences: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    num_decodes: int = 0
    samples: list[Sequence] = field(default_factory=list)
    sample_rows: list[int] = field(default_factory=list)
    reads: list[PromptRead] = field(default_factory=list)
    num_tokens: int = 0
    load: StepLoad = field(default_factory=StepLoad)
    captures: Captures = Captures.NONE


class Scheduler:
    def __init__(self, cache: CacheManager, *, max_running: int, max_tokens: int, admission: Admission, pacer: Pacer) -> None:
        """`max_running` may not exceed the rows of `cache.tables` nor `max_tokens`, the budget of one step."""
        self.cache = cache
        self.max_running = min(max_running, max_tokens)
        self.max_tokens = max_tokens
        self.admission = admission
        self.pacer = pacer
        self.waiting = WaitingQueue()
        self.prefilling: deque[Sequence] = deque()
        self.decoding: list[Sequence] = []
        self.leaving: set[Sequence] = set()
        """Finished or preempted, but a step in flight includes them: they keep slot and blocks until it is over."""
        self.sequences: dict[str, Sequence] = {}
        self.num_preemptions = 0
        self._free_slots = list(range(self.max_running - 1, -1, -1))

    @property
    def num_running(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def has_work(self) -> bool:
        return bool(self.sequences or self.leaving)

    # ---- requests come and go

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises QueueFull, or RequestRejected if its identifier is in use."""
        if sequence.request_id in self.sequences:
            raise RequestRejected(f"a request {sequence.request_id!r} is running already")
        sequence.predicted_tokens = self.admission.predict(sequence.prompt_len, sequence.max_new_tokens)
        self.admission.check(sequence, self.waiting, len(self._free_slots))
        self.sequences[sequence.request_id] = sequence
        self.waiting.add(sequence)

    def abort(self, request_id: str, num_tokens: int | None = None) -> bool:
        """End a request; no output follows. Its blocks are free at once, or when the step in flight is over.

        `num_tokens`: its answer has ended with so many, and the prefix cache keeps none of those after them."""
        sequence = self.sequences.get(request_id)
        if sequence is None:
            return False
        sequence.finish_reason = "abort"
        if num_tokens is not None and num_tokens < sequence.num_generated:
            self.cache.disown(sequence, sequence.prompt_len + num_tokens)
            del sequence.tokens[sequence.prompt_len + num_tokens :]
        self._finish(sequence)
        return True

    def stop(self, request_id: str) -> TokenOutput:
        """End a request whose grammar has ended: what was sampled after that does not count."""
        sequence = self.sequences[request_id]
        sequence.finish_reason = "stop"
        self._finish(sequence)
        return TokenOutput(request_id=request_id, token_ids=[], finish_reason="stop", num_cached_tokens=sequence.num_cached_tokens)

    def fail(self, request_id: str, error: str, code: ErrorCode = "error") -> TokenOutput:
        """End a request by its own error, which the output tells."""
        sequence = self.sequences[request_id]
        sequence.finish_reason = "error"
        self._finish(sequence)
        return TokenOutput(request_id=request_id, token_ids=[], finish_reason="error", error=error, error_code=code)

    # ---- one step

    def schedule(self) -> Step | None:
        """The next step, or None if nothing can run now (though something may be in flight, or wait for blocks that are)."""
        step = Step()
        self._schedule_decodes(step)
        step.num_decodes = step.num_tokens
        for sequence in list(self.prefilling):
            if not self._schedule_chunk(step, sequence):
                return step
        while len(self.waiting) and self._has_room(step) and (admitted := self._admit_next()):
            self._schedule_chunk(step, admitted)
        if step.reads:
            step.reads.sort(key=lambda read: read.sequence.pooling is not None)
        return step if step.num_tokens else None

    def _has_room(self, step: Step) -> bool:
        return step.num_tokens < self.max_tokens and self.pacer.chunk(step.load, 0, self.max_tokens) > 0

    def _schedule_decodes(self, step: Step) -> None:
        block_size = self.cache.block_size
        for sequence in list(self.decoding):
            computed = sequence.num_computed
            if sequence.num_sampled >= sequence.max_new_tokens or not computed:
                continue  # its last token is in flight, or it was preempted for a sequence before it in this loop
            if computed == len(sequence.blocks) * block_size and not self._grow(sequence, step):
                continue
            step.sequences.append(sequence)
            step.starts.append(computed)
            sequence.num_computed = computed + 1
            sequence.num_sampled += 1
            sequence.in_flight += 1
        step.num_tokens = step.load.decodes = len(step.sequences)
        step.load.decode_context = sum(step.starts)
        step.query_lens = [1] * step.num_tokens
        step.samples = step.sequences.copy()
        step.sample_rows = list(range(step.num_tokens))

    def _schedule_chunk(self, step: Step, sequence: Sequence) -> bool:
        """Add what fits of a prompt; False if nothing does."""
        start, length = sequence.num_computed, sequence.length
        count = self.pacer.chunk(step.load, start, min(length - start, self.max_tokens - step.num_tokens))
        if not count:
            return False
        step.load.add_chunk(start, count)
        step.sequences.append(sequence)
        step.starts.append(start)
        step.query_lens.append(count)
        step.num_tokens += count
        sequence.num_computed = start + count
        sequence.in_flight += 1
        self.cache.publish(sequence, sequence.num_computed)
        if sequence.num_read < sequence.read_end or not sequence.max_new_tokens:
            self._schedule_read(step, sequence, start, count)
        if sequence.num_computed == length:
            self.prefilling.remove(sequence)
            insort(self.decoding, sequence, key=_arrival)
            if sequence.max_new_tokens:
                sequence.num_sampled += 1
                step.samples.append(sequence)
                step.sample_rows.append(step.num_tokens - 1)
        return True

    def _schedule_read(self, step: Step, sequence: Sequence, start: int, count: int) -> None:
        """Read what is wanted of the chunk that was just added. A request for nothing but its prompt ends with the prompt's last chunk."""
        first, stop = max(start, sequence.num_read), min(start + count, sequence.read_end)
        ends = not sequence.max_new_tokens and start + count == sequence.length
        if stop > first or ends:
            row = step.num_tokens - count + first - start
            step.reads.append(PromptRead(sequence, first, max(0, stop - first), row, ends))
            sequence.num_read = max(sequence.num_read, stop)

    def _admit_next(self) -> Sequence | None:
        """Take the first waiting sequence that is ready into the running ones, if there is room."""
        sequence = self.waiting.first() if self._free_slots else None
        if sequence is None:
            return None
        if sequence.in_flight or not self.cache.admit(sequence, self._free_slots[-1], reserve=self.num_running):
            return None
        self._free_slots.pop()
        self.waiting.take(sequence)
        self.prefilling.append(sequence)
        if sequence.admitted_at is None:
            sequence.admitted_at = time.monotonic()
        return sequence

    # ---- room

    def _grow(self, sequence: Sequence, step: Step) -> bool:
        """A block for `sequence`, from another one if need be; False if it must sit this step out or was itself preempted."""
        if self.cache.grow(sequence):
            return True
        if not self._blocks_are_coming():
            victim = self._cheapest_victim(step)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        return self.cache.grow(sequence)

    def _blocks_are_coming(self) -> bool:
        return any(self.cache.num_exclusive(s) for s in self.leaving)

    def _cheapest_victim(self, step: Step) -> Sequence | None:
        """Of the running sequences that are not in `step` yet: the lowest priority, the fewest tokens to compute again, the youngest."""
        chosen = set(step.sequences)
        running = [*self.decoding, *self.prefilling]
        oldest = min(running, key=_arrival)
        candidates = [s for s in running if s is not oldest and s not in chosen and s.num_sampled < s.max_new_tokens]
        costs = [(-s.priority, self._recompute_cost(s), -s.arrival, s) for s in candidates if self.cache.num_exclusive(s)]
        return min(costs)[-1] if costs else None

    def _recompute_cost(self, sequence: Sequence) -> int:
        """Tokens to compute again, those in blocks that others hold too excepted."""
        num_shared = len(sequence.blocks) - self.cache.num_exclusive(sequence)
        return max(0, sequence.num_computed - num_shared * self.cache.block_size)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        sequence.preempted = True
        sequence.num_computed = 0
        self._leave(sequence)
        self.waiting.put_back(sequence)

    # ---- results

    def postprocess(
        self,
        step: Step,
        tokens: Seq[int],
        logprobs: Seq[TokenLogprobs | None] | None = None,
        reads: Seq[PromptLogprobs | NDArray[np.float32]] = (),
    ) -> list[TokenOutput]:
        """Account for a step that is over; `tokens[i]` was sampled for `step.samples[i]`, and is dropped if that sequence is no more.
        `reads[i]` is of `step.reads[i]`: log-probabilities, or the sum of hidden states [hidden]."""
        for sequence in step.sequences:
            sequence.in_flight -= 1
        outputs = [output for read, value in zip(step.reads, reads, strict=True) if (output := self._take_read(read, value))]
        block_size = self.cache.block_size
        for i, (sequence, token) in enumerate(zip(step.samples, tokens, strict=True)):
            if sequence.finish_reason is not None:
                continue
            sequence.tokens.append(token)
            if sequence.matcher is not None:
                sequence.matcher.push(token)
            generated = len(sequence.tokens) - sequence.prompt_len
            if token in sequence.stop_ids and generated > sequence.min_new_tokens:
                sequence.finish_reason = "stop"
            elif generated >= sequence.max_new_tokens:
                sequence.finish_reason = "length"
            entry = logprobs[i] if logprobs is not None else None
            outputs.append(
                TokenOutput(
                    request_id=sequence.request_id,
                    token_ids=[token],
                    logprobs=[entry] if entry is not None else None,
                    finish_reason=sequence.finish_reason,
                    num_cached_tokens=sequence.num_cached_tokens,
                    queue_seconds=sequence.admitted_at - sequence.arrived_at
                    if generated == 1 and sequence.admitted_at is not None
                    else None,
                )
            )
            if sequence.finish_reason is not None:
                self._finish(sequence)
            elif len(sequence.tokens) % block_size == 1:
                self._publish_known(sequence)
        for sequence in [s for s in self.leaving if not s.in_flight] if self.leaving else ():
            self.leaving.discard(sequence)
            self._release(sequence)
        return outputs

    def _take_read(self, read: PromptRead, value: PromptLogprobs | NDArray[np.float32]) -> TokenOutput | None:
        sequence = read.sequence
        if sequence.finish_reason is not None:
            return None
        embedding = b""
        if not isinstance(value, PromptLogprobs):
            sequence.pooled = value.astype(np.float64) if sequence.pooled is None else sequence.pooled + value
            if not read.ends:
                return None
            count = 1 if sequence.pooling == "last" else sequence.prompt_len
            embedding = (sequence.pooled / count).astype("<f4").tobytes()
        if read.ends:
            sequence.finish_reason = "length"
            self._finish(sequence)
        return TokenOutput(
            request_id=sequence.request_id,
            token_ids=[],
            finish_reason=sequence.finish_reason,
            num_cached_tokens=sequence.num_cached_tokens,
            prompt_logprobs=value if isinstance(value, PromptLogprobs) and read.count else None,
            embedding=embedding,
        )

    def give_up(self, step: Step, failures: Mapping[Sequence, str]) -> list[TokenOutput]:
        """End the sequences of a step that could not be computed, with their cause; before `postprocess` of that step.

        What they were to write is not in the cache, so whoever shares it from the same step on is computed anew. Who was admitted with the
        step, but has no part in it, has its block table sent once more.
        """
        outputs: list[TokenOutput] = []
        lost: set[int] = set()
        for sequence, start in zip(step.sequences, step.starts, strict=True):
            failed, misled = sequence in failures, not lost.isdisjoint(sequence.blocks)
            if not failed and not misled:
                continue
            lost |= self.cache.disown(sequence, start)
            sequence.num_computed = start
            if sequence in step.samples:
                step.samples.remove(sequence)
                sequence.num_sampled -= 1
            for read in [read for read in step.reads if read.sequence is sequence]:
                step.reads.remove(read)
                sequence.num_read = read.start
            if sequence.finish_reason is not None:
                continue
            if failed:
                outputs.append(self.fail(sequence.request_id, failures[sequence]))
            else:
                self._preempt(sequence)
        for sequence in [s for s in self.prefilling if s not in step.sequences]:
            if lost.isdisjoint(sequence.blocks):
                self.cache.resend_table(sequence)
            else:
                self._preempt(sequence)
        return outputs

    def _publish_known(self, sequence: Sequence) -> None:
        """Publish blocks whose tokens have reached the host and whose keys and values are computed."""
        self.cache.publish(sequence, min(sequence.num_computed, len(sequence.tokens)))

    # ---- leaving

    def _finish(self, sequence: Sequence) -> None:
        del self.sequences[sequence.request_id]
        self.admission.ended(sequence)
        if sequence.slot < 0 or sequence in self.leaving:  # never admitted, or preempted (perhaps with a step in flight)
            self.waiting.remove(sequence)
        else:
            self._publish_known(sequence)
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of the running ones; release what it holds now, or once no step in flight includes it."""
        (self.prefilling if sequence in self.prefilling else self.decoding).remove(sequence)
        if sequence.in_flight:
            self.leaving.add(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._free_slots.append(sequence.slot)
        self.cache.release(sequence)

    def check_integrity(self) -> None:
        """Assert that slots, blocks and queues agree."""
        running = [*self.prefilling, *self.decoding]
        holders = {id(s): s for s in (*running, *self.leaving)}.values()
        self.cache.check_integrity(holders)
        slots = [s.slot for s in holders]
        assert sorted(slots + self._free_slots) == list(range(self.max_running)), "a slot is lost or in two hands"
        waiting = [s for s in self.waiting if s not in self.leaving]
        assert all(not s.blocks and s.slot < 0 for s in waiting), "a waiting sequence holds blocks"
        assert {id(s) for s in (*running, *self.waiting)} == {id(s) for s in self.sequences.values()}, "a sequence is lost"


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
