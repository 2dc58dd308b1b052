"""Counts tokens of an answer that is passed on: by the replica's own report where there is one, else by the stream's events."""

from __future__ import annotations

import re

from gantline_runtime.server.usage_reports import COMMENT

from gantline_gateway.question import Question
from gantline_gateway.traffic import Usage

__all__ = ["Meter", "read_report"]

_REPORT = re.compile(rb"(\d{1,12}),(\d{1,12}),(\d{1,12})")
_TAIL_BYTES = 128
"""More than a report has."""


def read_report(report: str) -> Usage:
    """What the header says; no tokens where there is none, as in an error."""
    match = _REPORT.fullmatch(report.encode("latin-1"))
    return _usage(match) if match else Usage()


class Meter:
    """Of one stream. The report at its end is not passed on, unless the network has cut it in two: then clients see a comment."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._tail = b""
        self.events = 0

    def take(self, chunk: bytes) -> bytes:
        """`chunk` as the client gets it."""
        self.events += chunk.count(b"data: ")
        self._tail = (self._tail + chunk)[-_TAIL_BYTES:]
        start = chunk.find(COMMENT)
        return chunk if start < 0 else chunk[:start]

    def usage(self) -> Usage:
        match = _REPORT.match(self._tail.rpartition(COMMENT)[2]) if COMMENT in self._tail else None
        if match:
            return _usage(match)
        return Usage(self._question.prompt_tokens, max(0, self.events - 1), 0) if self.events else Usage()


def _usage(match: re.Match[bytes]) -> Usage:
    prompt, completion, cached = map(int, match.groups())
    return Usage(prompt, completion, cached, exact=True)
