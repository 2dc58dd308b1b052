"""How much each API key may use at once and in a minute, on one of several replicas of the gateway that know nothing of each other.

A limit is split evenly over the live replicas: requests reach them evenly too, since clients connect through a Service. Tokens are taken
from a bucket that holds a minute's worth and fills steadily. What a request will cost is estimated when it is admitted, and put right when
its answer has ended; a bucket may be in debt then, and the next request waits until it is paid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from gantline_gateway.keys import ApiKey
from gantline_gateway.question import Question

__all__ = ["Limiter", "OverLimit", "Share", "Ticket", "estimate_tokens", "split"]

_MINUTE_S = 60.0
_SMOOTHING = 0.2
_MAX_RETRY_S = 3600.0
_ANSWER_TOKENS = 256
"""Of an answer whose length the request does not bound."""


class OverLimit(Exception):
    """A key has used up what it may. `str` is a sentence for its owner; after `retry_after_s` (1 to 3600) a request like this one fits."""

    def __init__(self, limit: Literal["tokens", "concurrency"], message: str, retry_after_s: float) -> None:
        self.limit = limit
        self.retry_after_s = max(1, math.ceil(min(retry_after_s, _MAX_RETRY_S)))
        super().__init__(f"{message}. Try again in {self.retry_after_s} s.")


@dataclass(frozen=True)
class Share:
    """What one replica lets a key use. None: no limit."""

    tokens_per_minute: float | None
    concurrency: int | None


def split(key: ApiKey, replicas: int) -> Share:
    """The limits of `key` on each of `replicas`. Concurrency is rounded up: a replica that allows none would refuse for ever."""
    replicas = max(1, replicas)
    tokens = None if key.tokens_per_minute is None else key.tokens_per_minute / replicas
    return Share(tokens, None if key.concurrency is None else math.ceil(key.concurrency / replicas))


def estimate_tokens(question: Question) -> int:
    """What a request may use: its prompt, and the longest answers that it allows."""
    return question.prompt_tokens + question.choices * (_ANSWER_TOKENS if question.max_tokens is None else question.max_tokens)


@dataclass
class _Account:
    """What the keys of one name have used here. `tokens` is what is left of the bucket at `filled_at`, in seconds of the clock."""

    tokens: float = math.inf
    filled_at: float = 0.0
    running: int = 0
    seconds: float = 1.0
    """How long its requests take, smoothed."""

    def fill(self, per_minute: float, now: float) -> None:
        """An account that is new, or a limit that became smaller, begins with a full bucket of the limit's size."""
        self.tokens = min(per_minute, self.tokens + (now - self.filled_at) * per_minute / _MINUTE_S)
        self.filled_at = now


@dataclass
class Ticket:
    """One admitted request. `close` gives its place back, once."""

    _account: _Account
    _estimate: int
    _now: Callable[[], float]
    _began: float
    _open: bool = field(default=True)

    def close(self, tokens: int | None) -> None:
        """`tokens`: what the answer says was used, prompt and completion; None where it does not say, then the estimate stands."""
        if not self._open:
            return
        self._open = False
        account = self._account
        account.running -= 1
        account.seconds += _SMOOTHING * (self._now() - self._began - account.seconds)
        if tokens is not None:
            account.tokens += self._estimate - tokens


class Limiter:
    """Counts by key name, so that a new key of an old name begins where that one stood."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.replicas = 1
        """How many live replicas share the limits; whoever watches them sets it."""
        self._now = now
        self._accounts: dict[str, _Account] = {}

    def admit(self, key: ApiKey, estimate: int) -> Ticket:
        """A place for a request that will take about `estimate` tokens. Raises OverLimit.

        A request larger than a minute's worth is let in when the bucket is full: it would never fit otherwise.
        """
        now, share = self._now(), split(key, self.replicas)
        account = self._accounts.setdefault(key.name, _Account(filled_at=now))
        if share.concurrency is not None and account.running >= share.concurrency:
            message = f"This API key may have {key.concurrency} requests at once"
            raise OverLimit("concurrency", message, account.seconds / share.concurrency)
        if share.tokens_per_minute is not None:
            account.fill(share.tokens_per_minute, now)
            short = min(float(estimate), share.tokens_per_minute) - account.tokens
            if short > 0:
                message = f"This API key may use {key.tokens_per_minute} tokens a minute"
                raise OverLimit("tokens", message, short * _MINUTE_S / share.tokens_per_minute)
            account.tokens -= estimate
        account.running += 1
        return Ticket(account, estimate, self._now, now)
