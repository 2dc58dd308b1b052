"""Compiled grammars: made by processes of their own (`compile_process.py`), kept by their text, handed out as futures.

    submit(text) ──> kept? ──yes──────────────────────────────────────────────> Future
                       └─no──> thread ──pipe──> child compiles ──pipe──> deserialized there ──┘

A thread waits for each child, so neither the engine's loop nor its device ever does. Requests for the same text share one compilation.
A child that exceeds the limits is ended, as one that crashes it is replaced: both are the grammar's fault alone.
"""

from __future__ import annotations

import hashlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gantline_runtime.grammar.compile_process import read_message, write_message
from gantline_runtime.grammar.library import load_library

__all__ = ["GrammarCompiler", "InvalidGrammar"]

LIMIT_S = 10.0
"""Processor time that a grammar may take."""
TIMEOUT_S = 120.0
"""For a child to answer at all, or to start, on a machine that is busy."""
CACHE_BYTES = 1 << 30
"""A schema takes 0.5 to 8 MB with 128k tokens, so some hundreds are kept."""
CACHE_ENTRIES = 1024


class InvalidGrammar(ValueError):
    """The grammar cannot be used; the text is fit for a client."""


@dataclass
class _Entry:
    future: Future[Any]
    waiting: int = 0
    """Requests that wait for it."""
    num_bytes: int = 0


class GrammarCompiler:
    """`submit` and `release` are for one thread."""

    def __init__(
        self,
        model_dir: Path,
        *,
        vocab_size: int,
        stop_token_ids: Sequence[int],
        num_workers: int = 2,
        limit_s: float = LIMIT_S,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._setup = {"model_dir": str(model_dir), "vocab_size": vocab_size, "stop_token_ids": list(stop_token_ids)}
        self._limit_s, self._cache_bytes = limit_s, cache_bytes
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._pool = ThreadPoolExecutor(max_workers=num_workers, thread_name_prefix="grammar")
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._tokenizer: Any = None
        self._lock = threading.Lock()
        self._children: set[_Child] = set()
        self._closed = False
        self.num_compilations = 0

    def submit(self, grammar: str) -> Future[Any]:
        """The compiled grammar to come; the future may hold InvalidGrammar. Each call is to be followed by one of `release`."""
        key = _key(grammar)
        entry = self._entries.get(key)
        if entry is None:
            self.num_compilations += 1
            entry = self._entries[key] = _Entry(self._pool.submit(self._compile, grammar))
        entry.waiting += 1
        self._entries.move_to_end(key)
        return entry.future

    def release(self, grammar: str) -> None:
        """One request waits no longer. What nobody waits for is not begun; what is done stays for later requests, within the bounds."""
        key = _key(grammar)
        entry = self._entries[key]
        entry.waiting -= 1
        if entry.future.done() and not entry.num_bytes:
            entry.num_bytes = len(grammar) + (entry.future.result().memory_size_bytes() if entry.future.exception() is None else 0)
        elif not entry.waiting and entry.future.cancel():
            del self._entries[key]
        self._evict()

    def _evict(self) -> None:
        total = sum(entry.num_bytes for entry in self._entries.values())
        for key, entry in list(self._entries.items()):
            if total <= self._cache_bytes and len(self._entries) <= CACHE_ENTRIES:
                return
            if not entry.waiting and entry.future.done():
                total -= entry.num_bytes
                del self._entries[key]

    def close(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for child in self._children:
                child.kill()
        while not self._idle.empty():
            self._idle.get().close()

    # ---- in a thread of the pool

    def _compile(self, grammar: str) -> Any:
        child = self._take_child()
        try:
            answer = child.ask({"grammar": grammar, "limit_s": self._limit_s})
        except _ChildDied as death:
            self._forget(child)
            if death.timed_out:
                raise InvalidGrammar(f"compiling it takes longer than {self._limit_s:g} s; use a simpler one") from None
            raise InvalidGrammar("the compiler crashed over it; use a simpler one") from None
        self._idle.put(child)
        if "error" in answer:
            raise InvalidGrammar(answer["error"])
        return load_library().CompiledGrammar.deserialize_json(answer["compiled"], self._tokenizer)

    def _take_child(self) -> _Child:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return self._start_child()

    def _start_child(self) -> _Child:
        child = _Child()
        with self._lock:
            if self._closed:
                child.kill()
            self._children.add(child)
        try:
            answer = child.ask(self._setup)
        except _ChildDied:
            self._forget(child)
            raise RuntimeError("the grammar compiler could not be started; see the log") from None
        if "error" in answer:
            self._forget(child)
            raise InvalidGrammar(f"this model cannot follow grammars: {answer['error']}")
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_library().TokenizerInfo.deserialize_json(answer["tokenizer"])
        return child

    def _forget(self, child: _Child) -> None:
        with self._lock:
            self._children.discard(child)
        child.close()


class _ChildDied(Exception):
    def __init__(self, *, timed_out: bool) -> None:
        self.timed_out = timed_out


class _Child:
    """A process that compiles one grammar after another."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-m", "gantline_runtime.grammar.compile_process", str(os.getpid())]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Raises _ChildDied, also for one that was ended since it took too long."""
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(TIMEOUT_S, kill)
        timer.daemon = True
        timer.start()
        try:
            write_message(self._process.stdin, message)
            answer = read_message(self._process.stdout)
        except OSError:
            answer = None
        finally:
            timer.cancel()
        if answer is None:
            raise _ChildDied(timed_out=late.is_set() or self._process.wait() == -signal.SIGXCPU)
        return answer

    def kill(self) -> None:
        """Whoever waits for its answer finds it dead."""
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _key(grammar: str) -> bytes:
    return hashlib.blake2b(grammar.encode(), digest_size=16).digest()
