"""How many may wait, and what is told to who may not: bounds in requests and in predicted tokens, and an honest time to try again.

A request is predicted to take its prompt and what answers took lately, if it allows as much. Past a bound it is refused, and told when the
next place becomes free at the rate at which requests ended lately, behind all that were refused before it: who comes back then finds a
place, whoever else was refused.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from gantline_runtime.request import QueueFull, Sequence
from gantline_runtime.waiting import WaitingQueue

__all__ = ["Admission"]

_FIRST_GUESS = 256
"""Tokens of an answer, before any has ended."""
_SMOOTHING = 0.02
"""Weight of the answer that ended last."""
_RATE_WINDOW_S = 30.0
_MOST_WAIT_S = 60.0
_UNKNOWN_WAIT_S = 10.0
"""While nothing has ended lately."""
_SHARE_OF_REST = 4
"""A tenant may wait with this many times (its weight) as many requests as there are places left, so that the others find some."""


class Admission:
    """`max_waiting` requests and `max_waiting_tokens` predicted tokens may wait. `clock` is monotonic, in seconds."""

    def __init__(self, *, max_waiting: int, max_waiting_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_waiting, self._max_waiting_tokens, self._clock = max_waiting, max_waiting_tokens, clock
        self._answer_tokens = float(_FIRST_GUESS)
        self._ended: deque[tuple[float, int]] = deque(maxlen=4096)
        self._line_until = 0.0
        """When all that were refused so far will have found a place, if each comes back when told."""

    def predict(self, prompt_len: int, max_new_tokens: int) -> int:
        """Tokens that a request will have in the cache at its end."""
        return prompt_len + min(max_new_tokens, round(self._answer_tokens))

    def ended(self, sequence: Sequence) -> None:
        """Learn from a request that is over, or was given up."""
        if sequence.finish_reason in ("stop", "length"):
            self._answer_tokens += _SMOOTHING * (sequence.num_generated - self._answer_tokens)
        self._ended.append((self._clock(), sequence.predicted_tokens))

    def check(self, sequence: Sequence, waiting: WaitingQueue, num_free: int) -> None:
        """Raises QueueFull if `sequence` may not wait; `num_free` of those that wait will run with the next step."""
        places = self._max_waiting + num_free - len(waiting)
        if places <= 0:
            raise QueueFull(f"{len(waiting)} requests are waiting", self._place_in_line(1, 0))
        if waiting and waiting.num_tokens + sequence.predicted_tokens > self._max_waiting_tokens:
            needed = waiting.num_tokens + sequence.predicted_tokens - self._max_waiting_tokens
            text = f"requests of {waiting.num_tokens} predicted tokens are waiting, and this one has {sequence.predicted_tokens}"
            raise QueueFull(text, self._place_in_line(1, needed))
        own = waiting.num_of(sequence.tenant)
        if sequence.tenant and own > num_free and own >= _SHARE_OF_REST * sequence.weight * places:
            text = f"{own} requests with this API key are waiting, and the places that are left are for others"
            raise QueueFull(text, self._place_in_line(1, 0))

    def seconds_until_room(self) -> float:
        """When one more place becomes free, for who was not refused before."""
        return min(_MOST_WAIT_S, max(0.0, self._line_until - self._clock()) + self._seconds_for(1, 0))

    def _place_in_line(self, requests: int, tokens: int) -> float:
        now = self._clock()
        self._line_until = min(max(now, self._line_until) + self._seconds_for(requests, tokens), now + _MOST_WAIT_S)
        return self._line_until - now

    def _seconds_for(self, requests: int, tokens: int) -> float:
        """How long it takes until so many requests of so many tokens have ended, at the rate of the last seconds."""
        now = self._clock()
        while self._ended and self._ended[0][0] < now - _RATE_WINDOW_S:
            self._ended.popleft()
        if not self._ended:
            return _UNKNOWN_WAIT_S
        seconds = max(1.0, now - self._ended[0][0])
        num_tokens = max(1, sum(cost for _, cost in self._ended)) if tokens else 1
        return seconds * max(requests / len(self._ended), tokens / num_tokens)
