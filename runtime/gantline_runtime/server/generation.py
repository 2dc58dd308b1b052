"""One client's answer while it is made: its choices, what each has cost, and how long it took."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gantline_runtime.engine_client import EngineUnavailable, RequestFailed, RequestGroup
from gantline_runtime.messages import EngineRequest, TokenOutput
from gantline_runtime.server.errors import ApiError
from gantline_runtime.server.metrics import Metrics
from gantline_runtime.server.output import ChoiceOutput, Delta

if TYPE_CHECKING:
    from gantline_runtime.server.service import Ticket

__all__ = ["Choice", "Generation"]


@dataclass(slots=True)
class Choice:
    index: int
    request_id: str
    prompt: int
    """Number of the prompt; choices of one prompt share it."""
    prompt_len: int
    output: ChoiceOutput
    last_token_at: float | None = None
    submitted_at: float = 0.0
    queue_s: float = 0.0
    first_token_at: float = 0.0


class Generation:
    """Choices in the order of their submission. `close` aborts what is unfinished and gives the places back; it may be called twice."""

    def __init__(
        self,
        group: RequestGroup,
        metrics: Metrics,
        ticket: Ticket,
        *,
        at_once: int | None = None,
        timeout_s: float | None = None,
        grammar_param: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Of the requests that are submitted, at most `at_once` are in the engine, if given. After `timeout_s` seconds from the ticket's
        admission, what is unfinished fails with the code `deadline`. `grammar_param` is the field that the requests' grammar comes from,
        for its errors."""
        self._group, self._metrics, self._ticket, self._clock = group, metrics, ticket, clock
        self._grammar_param = grammar_param
        self._deadline: asyncio.TimerHandle | None = None
        if timeout_s is not None:
            error = RequestFailed(f"The answer was not complete after {timeout_s:g} s, as long as it was allowed to take.", "deadline")
            remaining = max(0.0, ticket.taken_at + timeout_s - clock())
            self._deadline = asyncio.get_running_loop().call_later(remaining, group.fail, error)
        self._failed = False
        self._at_once = at_once
        self._num_sent = 0
        self._held: deque[tuple[Choice, EngineRequest]] = deque()
        """What follows as others end."""
        self._choices: list[Choice] = []
        self._by_id: dict[str, Choice] = {}
        self._closed = False

    def submit(self, prompt: int, request: EngineRequest, output: ChoiceOutput) -> None:
        choice = Choice(len(self._choices), request.request_id, prompt, len(request.prompt_ids), output)
        self._choices.append(choice)
        self._by_id[request.request_id] = choice
        if self._at_once is None or self._num_sent < self._at_once:
            self._send(choice, request)
        else:
            self._held.append((choice, request))

    def _send(self, choice: Choice, request: EngineRequest) -> None:
        self._num_sent += 1
        choice.submitted_at = self._clock()
        self._group.submit(request)
        self._metrics.prompt_tokens.inc(choice.prompt_len)

    @property
    def choices(self) -> Sequence[Choice]:
        return self._choices

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def finish_reasons(self) -> list[str]:
        unfinished = "error" if self._failed else "abort"
        return [choice.output.finish_reason or unfinished for choice in self._choices]

    @property
    def finished(self) -> bool:
        return all(choice.output.finish_reason is not None for choice in self._choices)

    async def next(self) -> list[tuple[int, Delta]]:
        """What has been added since the last call: (index of the choice, delta). Not to be called once `finished`.
        Raises EngineUnavailable, RequestFailed, or ApiError for a grammar that cannot be used."""
        try:
            arrived = await self._group.next()
        except (EngineUnavailable, RequestFailed) as error:
            self._failed = not (isinstance(error, RequestFailed) and error.code == "client_too_slow")
            if isinstance(error, RequestFailed) and error.code == "invalid_grammar":
                param = self._grammar_param
                raise ApiError(400, f"{param}: {error}.", code="invalid_value", param=param) from None
            raise
        by_choice: dict[str, list[TokenOutput]] = {}
        for output in arrived:
            by_choice.setdefault(output.request_id, []).append(output)
        running = [(self._by_id[key], outputs) for key, outputs in by_choice.items() if self._by_id[key].output.finish_reason is None]
        return [(choice.index, delta) for choice, outputs in running for delta in self._take(choice, outputs)]

    def _take(self, choice: Choice, outputs: list[TokenOutput]) -> list[Delta]:
        before = choice.output.num_tokens
        deltas = choice.output.feed_each(outputs)
        for output in outputs:
            if output.queue_seconds is not None:
                choice.queue_s = output.queue_seconds
                self._metrics.queue_time.observe(output.queue_seconds)
        self._observe_tokens(choice, choice.output.num_tokens - before)
        reason = deltas[-1].finish_reason
        if reason is not None:
            self._group.abort(choice.request_id, choice.output.num_tokens)  # the engine does not know of stop strings
            self._metrics.finished(reason, self._seconds())
            self._observe_answer(choice)
            if self._held:
                self._send(*self._held.popleft())
        return deltas

    def _observe_answer(self, choice: Choice) -> None:
        if choice.last_token_at is None:  # nothing was generated
            return
        self._metrics.answered(
            prompt_tokens=choice.prompt_len,
            tokens=choice.output.num_tokens,
            prefill_s=max(0.0, choice.first_token_at - choice.submitted_at - choice.queue_s),
            decode_s=choice.last_token_at - choice.first_token_at,
        )

    def _observe_tokens(self, choice: Choice, count: int) -> None:
        if not count:
            return
        now = self._clock()
        if choice.last_token_at is None:
            self._metrics.time_to_first_token.observe(now - self._ticket.taken_at)
            choice.first_token_at = now
            count_after_first = count - 1
            elapsed = 0.0
        else:
            count_after_first, elapsed = count, (now - choice.last_token_at) / count
        for _ in range(count_after_first):
            self._metrics.inter_token_latency.observe(elapsed)
        choice.last_token_at = now
        self._metrics.generation_tokens.inc(count)

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`; a prompt counts once, however many choices share it."""
        prompts = {choice.prompt: choice for choice in reversed(self._choices)}
        prompt_tokens = sum(choice.prompt_len for choice in prompts.values())
        completion_tokens = sum(choice.output.num_tokens for choice in self._choices)
        cached = sum(choice.output.num_cached_tokens for choice in prompts.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": sum(choice.output.num_reasoning_tokens for choice in self._choices)},
        }

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        self._group.close()
        self._ticket.release()
        for choice in self._choices:
            if choice.output.finish_reason is None:
                self._metrics.finished("error" if self._failed else "abort", self._seconds())

    def _seconds(self) -> float:
        return self._clock() - self._ticket.taken_at
