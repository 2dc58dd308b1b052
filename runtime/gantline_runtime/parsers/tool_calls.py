"""Tool calls in a model's text, told apart from content.

    text ──begin of a block──> block ──its end──> calls, if it parses and names known tools, else content ──> text

What a model writes freely can turn out not to be a call at any moment, and what was sent cannot be taken back: a block is held until it is
whole, and comes back as content, unchanged, if it is no call. Where a grammar holds the model (`held`), every block is one: then calls
are given out while they are made, their arguments piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from gantline_runtime.parsers.events import ArgumentsDelta, CallBegin, ContentDelta, Event
from gantline_runtime.parsers.markers import held_back, split_at_marker
from gantline_runtime.parsers.tool_formats import ToolFormat

__all__ = ["HeldToolParser", "ToolParser"]

_MAX_BLOCK_CHARS = 1 << 20
"""A block that grows beyond is content: somebody must hold it in memory."""


class ToolParser:
    """For text that no grammar holds. White space beside calls belongs to them."""

    reasoning = False

    def __init__(self, kind: ToolFormat, names: Collection[str]) -> None:
        self._kind, self._names = kind, frozenset(names)
        self._step: Callable[[], list[Event] | None] = self._start if kind.only_at_start else self._text
        self._pending = ""
        self._num_calls = 0
        self._after_call = False
        """Whether only white space came since a call."""

    def feed(self, text: str) -> list[Event]:
        self._pending += text
        events: list[Event] = []
        while self._pending and (found := self._step()) is not None:
            events += found
        return events

    def finish(self) -> list[Event]:
        rest, self._pending = self._pending, ""
        if self._step == self._block:
            return self._close(rest)
        return self._content(rest)

    def _start(self) -> list[Event] | None:
        """The answer's beginning, where alone a block of some formats can begin."""
        text = self._pending.lstrip()
        if text.startswith(self._kind.begins):
            self._step = self._block
            return []
        if any(begin.startswith(text) for begin in self._kind.begins):
            return None
        self._step = self._rest
        return []

    def _rest(self) -> list[Event] | None:
        text, self._pending = self._pending, ""
        return [ContentDelta(text)]

    def _text(self) -> list[Event] | None:
        found = split_at_marker(self._pending, self._kind.begins)
        if found is not None:
            before, marker, after = found
            content = before.rstrip()
            self._pending, self._step = before[len(content) :] + marker + after, self._block
            return self._content(content)
        count = len(self._pending) - held_back(self._pending, self._kind.begins)
        content = self._pending[:count].rstrip()
        self._pending = self._pending[len(content) :]
        return self._content(content) if content else None

    def _block(self) -> list[Event] | None:
        at = self._pending.find(self._kind.end) if self._kind.end else -1
        size = at + len(self._kind.end) if at >= 0 else len(self._pending)
        if size > _MAX_BLOCK_CHARS:
            self._step = self._rest
            return []
        if at < 0:
            return None
        block, self._pending, self._step = self._pending[:size], self._pending[size:], self._text
        return self._close(block)

    def _close(self, block: str) -> list[Event]:
        calls = self._kind.parse(block.strip())
        if calls is None or any(call.name not in self._names for call in calls):
            return self._content(block)
        events: list[Event] = []
        for call in calls:
            events += [CallBegin(self._num_calls, call.name), ArgumentsDelta(self._num_calls, call.arguments)]
            self._num_calls += 1
        self._after_call = True
        return events

    def _content(self, text: str) -> list[Event]:
        if self._after_call:
            text = text.lstrip()
        if not text:
            return []
        self._after_call = False
        return [ContentDelta(text)]


class HeldToolParser:
    """For text that a grammar holds in the canonical form: nothing but calls, perhaps cut off by the limit of tokens.

    opening ──> before_name ──> name ──> arguments ──> after_arguments ──> separator ──> before_name ...
                                                              └──────────> closing
    """

    reasoning = False

    def __init__(self, kind: ToolFormat) -> None:
        self._kind = kind
        self._step: Callable[[], list[Event] | None] = self._begin
        self._pending = ""
        self._index = -1
        self._skipped = len(kind.opening) + len(kind.before_name)
        """Characters of the form's own that come next."""
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> list[Event]:
        self._pending += text
        events: list[Event] = []
        while self._pending and (found := self._step()) is not None:
            events += found
        return events

    def finish(self) -> list[Event]:
        return []

    def _begin(self) -> list[Event] | None:
        count = min(self._skipped, len(self._pending))
        self._pending, self._skipped = self._pending[count:], self._skipped - count
        if self._skipped:
            return None
        self._step = self._name
        return []

    def _name(self) -> list[Event] | None:
        name, end, rest = self._pending.partition(self._kind.after_name)
        if not end:
            return None
        self._index += 1
        self._pending, self._step = rest, self._arguments
        return [CallBegin(self._index, name)]

    def _arguments(self) -> list[Event] | None:
        text = self._pending
        for at, char in enumerate(text):
            self._follow(char)
            if not self._depth and not self._in_string and char == "}":
                self._pending, self._step = text[at + 1 :], self._begin
                self._skipped = len(self._kind.after_arguments) + len(self._kind.separator) + len(self._kind.before_name)
                return [ArgumentsDelta(self._index, text[: at + 1])]
        self._pending = ""
        return [ArgumentsDelta(self._index, text)]

    def _follow(self, char: str) -> None:
        """Count braces outside of strings."""
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = not self._escaped and char == "\\"
        elif char == '"':
            self._in_string = True
        elif char in "{}":
            self._depth += 1 if char == "{" else -1
