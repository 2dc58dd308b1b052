"""One loop from requests to tokens, over any executor.

    add_request -> Scheduler.schedule -> Executor.launch ..device works.. PendingTokens.read -> Scheduler.postprocess -> TokenOutput

On a GPU the loop runs one step ahead: step n+1 is scheduled and launched before the tokens of step n are read, so the host's work hides
behind the device's. Where a grammar constrains a row, only sampling waits: step n+1's forward pass is launched, then step n's tokens are
read and the masks written while it runs, then sampling is launched. On a CPU, which would only compute tokens that nobody wants, the loop
reads each step before it schedules the next; the code is the same, with another depth. Imports no torch.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from gantline_runtime import garbage
from gantline_runtime.admission import Admission
from gantline_runtime.batch import BatchLimits
from gantline_runtime.capture_pacing import CapturePacer
from gantline_runtime.config import EngineConfig
from gantline_runtime.failures import is_fatal
from gantline_runtime.isolation import rescue_step
from gantline_runtime.kv_cache import CacheManager
from gantline_runtime.messages import EngineRequest, PromptLogprobs, TokenLogprobs, TokenOutput
from gantline_runtime.pacing import Pacer
from gantline_runtime.request import RequestRejected, Sequence
from gantline_runtime.scheduler import Scheduler, Step

if TYPE_CHECKING:
    from gantline_runtime.executor import MemoryReport
    from gantline_runtime.grammar.matching import MatchState
    from gantline_runtime.grammar.requests import Grammars
    from gantline_runtime.model_runner import PendingTokens, StepResult
    from gantline_runtime.sampling import TokenMask

__all__ = ["EngineLoop", "EngineStats", "StepExecutor", "StepTimes"]

log = logging.getLogger("gantline.engine")

_IDLE_S = 0.005
"""How long a step with nothing else to do waits for a grammar to be compiled: messages are read in between."""
_SEEN_AT_ONCE = 0.01
"""Share of a step's time: who waits less for its end has come too late to see it."""
_QUEUED_CACHES = 16
"""How many times the cache's tokens may wait, unless the configuration says otherwise."""
_MOST_FAILURES_IN_A_ROW = 16
"""Past it the engine is taken for broken, whatever each request's own error says."""


@dataclass
class StepTimes:
    """Seconds, summed over all steps: where a step's time goes. Of the host, except for `device_s`."""

    schedule_s: float = 0.0
    launch_s: float = 0.0
    """Building and sending the batch; on a CPU the computation itself."""
    wait_s: float = 0.0
    """Waiting for the device."""
    mask_s: float = 0.0
    """Writing the masks of grammars, while the device runs the forward pass."""
    device_s: float = 0.0
    """While the device had a step to run; the other parts go on beside it."""
    postprocess_s: float = 0.0


@dataclass(frozen=True)
class EngineStats:
    """A snapshot; counters run since the start."""

    num_running: int
    num_waiting: int
    seconds_without_progress: float
    """Since a step was last launched or read, while there was work to do; 0 while idle, or waiting for grammars alone."""
    num_waiting_tokens: int
    """What those that wait are expected to take of the cache."""
    seconds_until_room: float
    """When a request that was refused for want of a place would find one."""
    num_cache_blocks: int
    block_size: int
    cache_usage: float
    """Share of the cache's blocks that running requests hold."""
    prefix_hit_rate: float
    """Share of prompt tokens whose keys and values the prefix cache had."""
    num_preemptions: int
    num_queried_tokens: int
    """Prompt tokens looked up in the prefix cache: those of requests that were admitted, not of those that wait."""
    num_cached_tokens: int
    """Prompt tokens that the prefix cache had."""
    num_shared_tokens: int
    """Context tokens that decoding requests behind one prefix did not read again."""
    num_generated_tokens: int
    num_finished: int
    num_steps: int
    step_times: StepTimes
    memory: MemoryReport
    load_seconds: float
    num_captures: int
    """CUDA graphs so far."""
    longest_capture_s: float
    about: Mapping[str, str] = field(default_factory=dict)
    """The model's class, whose implementation runs it, and why not ours."""


@dataclass(frozen=True)
class _Flight:
    """A step that was launched and not read yet."""

    step: Step
    pending: PendingTokens
    launched_at: float
    num_captures: int
    """CUDA graphs when it was launched."""


@dataclass
class _Counters:
    generated_tokens: int = 0
    finished: int = 0
    steps: int = 0
    failures_in_a_row: int = 0
    """Requests that failed alone since a step last succeeded."""
    times: StepTimes = field(default_factory=StepTimes)


class StepExecutor(Protocol):
    """What the loop needs of whoever runs steps: `Executor`, or a test's model that costs nothing."""

    config: EngineConfig
    depth: int
    """Steps that are launched before the oldest is read."""
    num_blocks: int
    limits: BatchLimits
    memory: MemoryReport
    capture_seconds: list[float]
    """How long the capture of each CUDA graph took."""

    @property
    def graph_tokens(self) -> Collection[int]:
        """Numbers of tokens of mixed steps that run as graphs (`GraphPlan.mixed_tokens`)."""
        ...

    @property
    def launch_seconds(self) -> Seq[float]:
        """How long the host launched the last steps without a graph."""
        ...

    @property
    def failed(self) -> bool: ...

    def launch(self, step: Step, cache: CacheManager, masks: Callable[[], TokenMask | None] | None = None) -> PendingTokens:
        """`masks` is called between the launches of the forward pass and of sampling; it may read earlier steps."""
        ...

    def read(self, pending: PendingTokens) -> StepResult: ...

    def prepare(self) -> bool:
        """Do one thing, of less than a tenth of a second, that later steps profit from; False if there is nothing. No step is in flight."""
        ...

    def check(self) -> None: ...

    def close(self) -> None: ...


class EngineLoop:
    """Requests in, tokens out, over any executor. Not thread-safe: one thread adds, steps and aborts."""

    def __init__(
        self,
        executor: StepExecutor,
        *,
        vocab_size: int,
        eos_token_ids: Seq[int],
        load_seconds: float = 0.0,
        grammars: Grammars | None = None,
        about: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`grammars` None: requests with a grammar are refused. `clock` in seconds; steps are timed by it."""
        config = executor.config
        assert config.session_len is not None
        self.config = config
        self.session_len: int = config.session_len
        self.eos_token_ids = tuple(eos_token_ids)
        self.vocab_size = vocab_size
        self._executor = executor
        self._load_seconds = load_seconds
        self._cache = CacheManager(
            num_blocks=executor.num_blocks,
            block_size=config.block_size,
            max_slots=executor.limits.max_slots,
            max_blocks=executor.limits.max_blocks,
            prefix_caching=config.enable_prefix_caching,
            on_cpu=config.device == "cpu",
        )
        self.pacer = Pacer(config.max_step_ms / 1000)
        self._captures = CapturePacer(
            self.pacer, executor.capture_seconds, executor.launch_seconds, executor.graph_tokens, direct=config.tp == 1
        )
        capacity = executor.num_blocks * config.block_size
        most_tokens = config.max_waiting_tokens if config.max_waiting_tokens is not None else _QUEUED_CACHES * capacity
        self._admission = Admission(max_waiting=config.max_waiting, max_waiting_tokens=most_tokens)
        self._scheduler = Scheduler(
            self._cache,
            max_running=config.max_batch_size,
            max_tokens=config.max_prefill_token_num,
            admission=self._admission,
            pacer=self.pacer,
        )
        self._grammars = grammars
        self._about = dict(about or {})
        self._clock = clock
        self._in_flight: deque[_Flight] = deque()
        self._last_done = self._progressed_at = clock()
        self._last_late = False
        self._arrivals = 0
        self._counters = _Counters()

    # ---- requests

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request. Raises RequestRejected if it can never run, QueueFull if too many wait."""
        self._check(request)
        if not self.has_work():
            self._progressed_at = self._clock()
        if request.grammar and self._grammars is None:
            raise RequestRejected("this engine follows no grammars")
        sequence = Sequence(
            request,
            arrival=self._arrivals,
            session_len=self.session_len,
            eos_token_ids=self.eos_token_ids,
            vocab_size=self.vocab_size,
        )
        self._scheduler.add(sequence)
        if self._grammars is not None and request.grammar:
            try:
                self._grammars.add(sequence)
            except BaseException:  # it would wait for ever
                self._scheduler.abort(request.request_id)
                raise
        self._arrivals += 1

    def _check(self, request: EngineRequest) -> None:
        prompt, vocab_size = request.prompt_ids, self.vocab_size
        if not prompt:
            raise RequestRejected("the prompt is empty")
        if len(prompt) + min(1, request.sampling.max_new_tokens) > self.session_len:
            raise RequestRejected(f"the prompt has {len(prompt)} tokens; with what is to be generated, {self.session_len} are the limit")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise RequestRejected(f"the prompt has a token outside of 0 to {vocab_size - 1}")
        if any(not 0 <= token < vocab_size for token in request.sampling.logit_bias):
            raise RequestRejected(f"logit_bias names a token outside of 0 to {vocab_size - 1}")
        if any(not 0 <= token < vocab_size for word in request.sampling.bad_words for token in word):
            raise RequestRejected(f"bad_words has a token outside of 0 to {vocab_size - 1}")
        reads = request.num_prompt_logprobs is not None or request.pooling is not None
        if request.sampling.max_new_tokens < (0 if reads else 1):
            raise RequestRejected("max_new_tokens must be 1 or more, or 0 to read the prompt only")
        if request.pooling is not None and (request.sampling.max_new_tokens or request.num_prompt_logprobs is not None):
            raise RequestRejected("a request with pooling has no other output")

    def abort(self, request_id: str, num_tokens: int | None = None) -> bool:
        """End a request early; no output follows. False if there is none of that name. Its blocks are free after at most one more step.

        `num_tokens`: its answer has ended with so many, and what was sampled after them is as if it had never been."""
        if self._grammars is not None:
            self._grammars.drop(request_id)
        return self._scheduler.abort(request_id, num_tokens)

    def has_work(self) -> bool:
        """Whether `step` has something to do: requests, a step in flight, or a dead rank to report."""
        return bool(self._in_flight) or self._scheduler.has_work() or self._executor.failed

    # ---- the loop

    def step(self) -> list[TokenOutput]:
        """Launch one step and take the results of the one `depth` before it.

        Raises RankError or a device's error; then the engine is dead.
        """
        self._executor.check()
        times = self._counters.times
        outputs = self._take_grammars() if self._grammars is not None and self._grammars.num_compiling else []
        t0 = self._clock()
        step = self._scheduler.schedule()
        times.schedule_s += self._clock() - t0
        if step is not None:
            step.captures = self._captures.allow(step.load)
            self._launch(step, outputs)
            self._counters.steps += 1
            self._tidy()
        elif self._grammars is not None and not self._in_flight:
            self._grammars.wait(_IDLE_S)
        if self._in_flight and (step is None or len(self._in_flight) > self._executor.depth):
            outputs += self._take_results(self._in_flight.popleft())
        return outputs

    def _tidy(self) -> None:
        """What is to be done now and then, while the device works and nobody waits for tokens that are there."""
        self.pacer.refit()
        garbage.collect_if_due()

    def prepare(self) -> bool:
        """With nothing else to do: make one thing ready that later steps would have to, a CUDA graph. False if there is nothing left.

        Raises what `step` raises where the engine is dead."""
        if self.has_work():
            return False
        try:
            return self._executor.prepare()
        except Exception as error:
            if is_fatal(error) or self.config.tp > 1:
                raise
            log.warning("a CUDA graph could not be made ahead of its use: %s", error)
            return True

    def _launch(self, step: Step, outputs: list[TokenOutput]) -> None:
        """Launch a step; results of earlier ones, taken since its masks need them, go to `outputs`."""
        times, num_captures = self._counters.times, len(self._executor.capture_seconds)
        started, elsewhere = self._clock(), times.wait_s + times.postprocess_s + times.mask_s
        try:
            pending = self._executor.launch(step, self._cache, self._masks_of(step, outputs))
        except Exception as error:
            outputs += self._rescue(step, error)
            return
        self._in_flight.append(_Flight(step, pending, started, num_captures))
        self._progressed_at = self._clock()
        times.launch_s += self._clock() - started - (times.wait_s + times.postprocess_s + times.mask_s - elsewhere)

    def _masks_of(self, step: Step, outputs: list[TokenOutput]) -> Callable[[], TokenMask | None] | None:
        """What writes the masks of a step; None where no grammar constrains it."""
        constrained = [row for row, sequence in enumerate(step.samples) if sequence.matcher is not None]
        return (lambda: self._masks(step, constrained, outputs)) if constrained else None

    def _masks(self, step: Step, rows: list[int], outputs: list[TokenOutput]) -> TokenMask | None:
        """Masks of a step whose forward pass runs: what follows the tokens of the steps before, which are taken first."""
        while self._in_flight:
            outputs += self._take_results(self._in_flight.popleft())
        started = self._clock()
        running = [row for row in rows if step.samples[row].finish_reason is None]  # of the others the token is dropped
        assert self._grammars is not None
        mask, over = self._grammars.masks(running, [step.samples[row] for row in running])
        for sequence, state in over:
            outputs.append(self._end_match(sequence.request_id, state))
        self._counters.times.mask_s += self._clock() - started
        return mask

    def _end_match(self, request_id: str, state: MatchState) -> TokenOutput:
        if state == "ended":
            return self._scheduler.stop(request_id)
        if state == "slow":
            return self._scheduler.fail(request_id, "following it takes too long; use a simpler one", "invalid_grammar")
        if state == "forbidden":
            return self._scheduler.fail(request_id, "bad_words leave nothing of what may come next", "invalid_grammar")
        return self._scheduler.fail(request_id, "nothing that the model can say continues the grammar")

    def _take_grammars(self) -> list[TokenOutput]:
        """Let requests run whose grammar is compiled by now; end those whose grammar cannot be."""
        assert self._grammars is not None
        return [self._scheduler.fail(request_id, error, code) for request_id, error, code in self._grammars.take()]

    def _rescue(self, step: Step, error: Exception) -> list[TokenOutput]:
        """The results of all steps in flight and of `step`, whose launch raised `error`: its sequences that raise by themselves end with
        their error, the others go on. Raises `error` if that cannot help."""
        if is_fatal(error) or self.config.tp > 1:  # other ranks are in the middle of the step
            raise error
        outputs: list[TokenOutput] = []
        while self._in_flight:
            outputs += self._take_results(self._in_flight.popleft())
        rescue = rescue_step(step, lambda part: self._run_part(part, outputs), error)
        self._counters.failures_in_a_row = self._counters.failures_in_a_row + len(rescue.failures) if not rescue.num_run else 0
        if self._counters.failures_in_a_row > _MOST_FAILURES_IN_A_ROW:
            raise error
        failed = self._scheduler.give_up(step, {s: f"{type(e).__name__}: {e}" for s, e in rescue.failures.items()})
        outputs += failed
        self._counters.finished += len(failed)
        return outputs + self._account(step, *rescue.results_of(step))

    def _run_part(self, part: Step, outputs: list[TokenOutput]) -> StepResult:
        for sequence in part.sequences:
            self._cache.resend_table(sequence)
        return self._executor.read(self._executor.launch(part, self._cache, self._masks_of(part, outputs)))

    def _take_results(self, flight: _Flight) -> list[TokenOutput]:
        t0 = self._clock()
        result = self._executor.read(flight.pending)
        now = self._clock()
        waited = now - t0
        self._counters.times.wait_s += waited
        self._counters.failures_in_a_row = 0
        seconds, self._last_done = now - max(flight.launched_at, self._last_done), now
        self._progressed_at = now
        self._counters.times.device_s += seconds
        self._learn(flight, seconds, late=self._executor.depth > 0 and waited < _SEEN_AT_ONCE * seconds)
        return self._account(flight.step, *result)

    def _learn(self, flight: _Flight, seconds: float, *, late: bool) -> None:
        """`late`: the step was over before the host looked, busy with launching the next; so this one took less, and the next one more
        than it will seem to."""
        began_late, self._last_late = self._last_late, late
        captured = len(self._executor.capture_seconds) != flight.num_captures  # which says nothing of running it
        if not captured and (late or not began_late):
            self.pacer.observe(flight.step.load, seconds, at_most=late)

    def _account(
        self,
        step: Step,
        tokens: Seq[int],
        logprobs: Seq[TokenLogprobs | None] | None,
        reads: Seq[PromptLogprobs | NDArray[np.float32]],
    ) -> list[TokenOutput]:
        t0, counters = self._clock(), self._counters
        outputs = self._scheduler.postprocess(step, tokens, logprobs, reads)
        counters.generated_tokens += sum(len(output.token_ids) for output in outputs)
        counters.finished += sum(output.finish_reason is not None for output in outputs)
        counters.times.postprocess_s += self._clock() - t0
        return outputs

    # ---- what others want to know

    def stats(self) -> EngineStats:
        scheduler, cache, counters = self._scheduler, self._cache, self._counters
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            seconds_without_progress=self._seconds_without_progress(),
            num_waiting_tokens=scheduler.waiting.num_tokens,
            seconds_until_room=self._admission.seconds_until_room(),
            num_cache_blocks=cache.num_blocks,
            block_size=cache.block_size,
            cache_usage=cache.usage,
            prefix_hit_rate=cache.hit_rate,
            num_preemptions=scheduler.num_preemptions,
            num_queried_tokens=cache.num_queried_tokens,
            num_cached_tokens=cache.num_hit_tokens,
            num_shared_tokens=cache.groups.num_saved_tokens,
            num_generated_tokens=counters.generated_tokens,
            num_finished=counters.finished,
            num_steps=counters.steps,
            step_times=replace(counters.times),
            memory=self._executor.memory,
            load_seconds=self._load_seconds,
            num_captures=len(self._executor.capture_seconds),
            longest_capture_s=max(self._executor.capture_seconds, default=0.0),
            about=self._about,
        )

    def _seconds_without_progress(self) -> float:
        compiling = self._grammars is not None and self._grammars.num_compiling and not self._scheduler.num_running
        return 0.0 if compiling or not self.has_work() else self._clock() - self._progressed_at

    def prefix_marks(self) -> list[int]:
        """Hashes of all beginnings of prompts that the cache holds, of those that requests named (`EngineRequest.prefix_marks`)."""
        return list(self._cache.prefix.marks)

    def take_prefix_changes(self) -> tuple[list[int], list[int]]:
        """(hashes that came, hashes that went) since the last call."""
        return self._cache.prefix.marks.take_changes()

    def reset_prefix_cache(self) -> None:
        """Forget every cached block that no running request holds."""
        self._cache.clear_prefixes()

    def check_integrity(self) -> None:
        """Assert the invariants of scheduler and cache."""
        self._scheduler.check_integrity()

    def close(self) -> None:
        """End the other ranks and give up the model's memory; the engine cannot be used afterwards."""
        if self._grammars is not None:
            self._grammars.close()
        self._in_flight.clear()
        self._executor.close()
