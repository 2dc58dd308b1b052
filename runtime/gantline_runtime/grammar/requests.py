"""The grammars of an engine's requests: those that are being compiled, and the masks of those that run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from gantline_runtime.grammar.compiler import GrammarCompiler, InvalidGrammar
from gantline_runtime.grammar.matching import GrammarMatcher, MaskWriter, MatchState
from gantline_runtime.memory import available_cpus
from gantline_runtime.messages import ErrorCode
from gantline_runtime.request import Sequence
from gantline_runtime.sampling import TokenMask

__all__ = ["Grammars"]

_MAX_WORKERS = 4
"""Processes that compile; each has threads of its own and holds the vocabulary (150 MB for 128k tokens)."""
_MAX_THREADS = 8
"""For the masks of one step; more gain nothing, since one takes some tens of microseconds."""

log = logging.getLogger("gantline.engine")


class Grammars:
    """Nothing is imported, allocated or started before the first request that has a grammar. For one thread."""

    def __init__(self, model_dir: Path, *, vocab_size: int, eos_token_ids: Seq[int], max_rows: int, pinned: bool) -> None:
        num_workers = max(2, min(_MAX_WORKERS, available_cpus() // 4))
        self._compiler = GrammarCompiler(model_dir, vocab_size=vocab_size, stop_token_ids=eos_token_ids, num_workers=num_workers)
        self._eos_token_ids = tuple(eos_token_ids)
        self._max_rows, self._vocab_size, self._pinned = max_rows, vocab_size, pinned
        self._writer: MaskWriter | None = None
        self._compiling: dict[str, tuple[Sequence, Future[Any]]] = {}

    @property
    def num_compiling(self) -> int:
        """Requests that wait for their grammar."""
        return len(self._compiling)

    def add(self, sequence: Sequence) -> None:
        """Have the grammar of a new sequence compiled; it is not `ready` until `take` finds it done."""
        self._compiling[sequence.request_id] = sequence, self._compiler.submit(sequence.grammar)
        self._start_if_done(sequence.request_id)

    def drop(self, request_id: str) -> None:
        """A request has ended, whether it has a grammar or not; one that nobody else awaits and that is not begun is not compiled."""
        if request_id in self._compiling:
            self._forget(request_id)

    def take(self) -> Iterator[tuple[str, str, ErrorCode]]:
        """Make those ready whose grammar is compiled by now; gives (request, error, code) of those that can never be."""
        for request_id, (_, future) in list(self._compiling.items()):
            if future.done() and (error := future.exception()) is not None:
                self._forget(request_id)
                yield request_id, *_explain(error)
            else:
                self._start_if_done(request_id)

    def _start_if_done(self, request_id: str) -> None:
        sequence, future = self._compiling[request_id]
        if future.done() and future.exception() is None:
            sequence.matcher = GrammarMatcher(future.result(), self._eos_token_ids, self._vocab_size, sequence.sampling.bad_words)
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        sequence, _ = self._compiling.pop(request_id)
        self._compiler.release(sequence.grammar)

    def wait(self, seconds: float) -> None:
        """Until a grammar is compiled, or for `seconds`; not at all if none is awaited."""
        if self._compiling:
            wait([future for _, future in self._compiling.values()], timeout=seconds, return_when=FIRST_COMPLETED)

    def masks(self, rows: Seq[int], sequences: Seq[Sequence]) -> tuple[TokenMask | None, list[tuple[Sequence, MatchState]]]:
        """(what the grammars of `sequences`, sampled in `rows` of a step, allow next; those of them that cannot go on, and why)."""
        if not rows:
            return None, []
        if self._writer is None:
            threads = min(_MAX_THREADS, max(1, available_cpus() // 2))
            self._writer = MaskWriter(max_rows=self._max_rows, vocab_size=self._vocab_size, num_threads=threads, pinned=self._pinned)
        matchers = [sequence.matcher for sequence in sequences if isinstance(sequence.matcher, GrammarMatcher)]
        mask = self._writer.write(rows, matchers)
        return mask, [(sequence, m.state) for sequence, m in zip(sequences, matchers, strict=True) if m.state != "open"]

    def close(self) -> None:
        self._compiling.clear()
        if self._writer is not None:
            self._writer.close()
        self._compiler.close()


def _explain(error: BaseException) -> tuple[str, ErrorCode]:
    if isinstance(error, InvalidGrammar):
        return str(error), "invalid_grammar"
    log.error("a grammar could not be compiled", exc_info=error)
    return str(error), "error"
