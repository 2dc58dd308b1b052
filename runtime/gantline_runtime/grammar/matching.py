"""Following a grammar, token by token: one matcher a request, and the masks of a step's rows.

What a token means to a grammar, and what it allows next, is usually known in microseconds. A client can write one, though, for which it
takes minutes, in a native call that nothing can interrupt. So matchers are advanced by threads of their own, and one that takes more than
`LIMIT_S` of a thread's time is given up together with the thread; the others are advanced by the remaining threads, or by new ones.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from gantline_runtime.grammar.library import load_library
from gantline_runtime.sampling import TokenMask

__all__ = ["GrammarMatcher", "MaskWriter", "MatchState"]

MatchState = Literal["open", "ended", "rejected", "slow", "forbidden"]
"""`ended`: nothing can follow; `rejected`: a token was none that it allows; `slow`: it was given up; `forbidden`: all that can follow
completes a bad word."""

LIMIT_S = 0.5
"""Of processor time, so that a busy machine is no client's fault."""
_POLL_S = 0.05


class GrammarMatcher:
    """How far one request's answer has come in its grammar. It moves with tokens that have reached the host and count, never with
    those that an overlapped step sampled beyond an end."""

    def __init__(self, compiled: Any, stop_token_ids: Sequence[int], vocab_size: int, bad_words: Sequence[tuple[int, ...]] = ()) -> None:
        """Where the grammar may end, the stop tokens are allowed too; with none, its end is the answer's."""
        unlimited_rollback, default_temperature = -1, None
        self._native = load_library().GrammarMatcher(
            compiled, list(stop_token_ids) or None, not stop_token_ids, unlimited_rollback, default_temperature
        )
        self.state: MatchState = "open"
        self.allowed = torch.empty((1, -(-vocab_size // 32)), dtype=torch.int32)
        """Bits of the tokens that may come next, while `state` is open."""
        self._pushed: list[int] = []
        self._bad_words = bad_words
        self._last: list[int] = []
        """The answer's last tokens, as many as a bad word may begin with."""

    def push(self, token: int) -> None:
        """The answer goes on with `token`. What that means is found out by `advance`."""
        self._pushed.append(token)

    def advance(self) -> None:
        """Take what was pushed, and find out what may come next. May take any time."""
        pushed, self._pushed = self._pushed, []
        if not all(self._native.accept_token(token, False) for token in pushed):
            self.state = "rejected"
        elif self._native.is_terminated():
            self.state = "ended"
        else:
            self._native.fill_next_token_bitmask(self.allowed, 0, False)
            if self._bad_words and not self._leaves_any(pushed):
                self.state = "forbidden"

    def _leaves_any(self, pushed: list[int]) -> bool:
        """Whether bad words leave anything of what may come next: with no token allowed at all, there is nothing to sample."""
        longest = max(map(len, self._bad_words)) - 1
        self._last = (self._last + pushed)[-longest:] if longest else []
        bits = self.allowed.numpy().view(np.uint32).reshape(-1).copy()
        for *begun, token in self._bad_words:
            if self._last[len(self._last) - len(begun) :] == begun:
                bits[token // 32] &= ~np.uint32(1 << token % 32)
        return bool(bits.any())


class MaskWriter:
    def __init__(self, *, max_rows: int, vocab_size: int, num_threads: int, pinned: bool) -> None:
        """One buffer is enough: it is written anew only when the tokens of the step that used it have been read."""
        self._bits = torch.empty((max_rows, -(-vocab_size // 32)), dtype=torch.int32, pin_memory=pinned)
        self._num_threads = num_threads
        self._idle: list[_Thread] = []

    def write(self, rows: Sequence[int], matchers: Sequence[GrammarMatcher]) -> TokenMask:
        """Advance all matchers; what those allow that are open then, each in its row."""
        waiting = list(range(len(rows)))
        while waiting:
            waiting = self._advance(waiting, matchers)
        kept = [i for i, matcher in enumerate(matchers) if matcher.state == "open"]
        bits = self._bits[: len(kept)]
        if kept:
            torch.cat([matchers[i].allowed for i in kept], out=bits)
        return TokenMask(np.array([rows[i] for i in kept], dtype=np.int64), bits)

    def _advance(self, places: Sequence[int], matchers: Sequence[GrammarMatcher]) -> list[int]:
        """Advance the matchers at `places`; gives those that waited behind one that takes too long."""
        count = min(self._num_threads, len(places))
        while len(self._idle) < count:
            self._idle.append(_Thread())
        busy = [self._idle.pop() for _ in range(count)]
        for i, thread in enumerate(busy):
            thread.begin([matchers[place] for place in places[i::count]])
        unreached: list[int] = []
        for i, thread in enumerate(busy):
            if thread.finish():
                self._idle.append(thread)
            else:
                own = places[i::count]
                matchers[own[thread.at]].state = "slow"
                unreached += own[thread.at + 1 :]
        return unreached

    def close(self) -> None:
        for thread in self._idle:
            thread.end()
        self._idle.clear()


class _Thread:
    """Advances one list of matchers after another. It does not keep the process alive."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[list[GrammarMatcher] | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self.at = 0
        """The place that it is at."""
        self._began = 0.0
        """Processor time of the thread when it came there."""
        self._abandoned = False
        thread = threading.Thread(target=self._run, name="grammar-mask", daemon=True)
        thread.start()
        assert thread.ident is not None
        self._clock = time.pthread_getcpuclockid(thread.ident)

    def begin(self, matchers: list[GrammarMatcher]) -> None:
        self._done.clear()
        self._began = time.clock_gettime(self._clock)
        self._work.put(matchers)

    def finish(self) -> bool:
        """Wait for the end of the work; False if one matcher takes too long, then the thread ends when that one does."""
        while not self._done.wait(_POLL_S):
            if time.clock_gettime(self._clock) - self._began > LIMIT_S and not self._done.is_set():
                self._abandoned = True
                return False
        return True

    def end(self) -> None:
        self._work.put(None)

    def _run(self) -> None:
        while (matchers := self._work.get()) is not None:
            for self.at, matcher in enumerate(matchers):
                self._began = time.thread_time()
                matcher.advance()
                if self._abandoned:
                    return
            self._done.set()
