"""Reasoning between two markers at the beginning of an answer, told apart from what follows.

The prompt may end with the opening marker already (the template writes it); otherwise the answer begins with it, or there is no reasoning.
Line ends beside the markers belong to neither part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gantline_runtime.parsers.events import ContentDelta, Event, ReasoningDelta
from gantline_runtime.parsers.markers import held_back

__all__ = ["REASONING_FORMATS", "ReasoningFormat", "ReasoningParser"]


@dataclass(frozen=True)
class ReasoningFormat:
    begin: str
    end: str

    def begins_inside(self, prompt: str) -> bool:
        """Whether the answer to `prompt` begins in the midst of reasoning."""
        return prompt.rstrip().endswith(self.begin)

    def is_over(self, prompt: str) -> bool:
        """Whether the template has ended the reasoning already, as it does where thinking is switched off."""
        return prompt.rstrip().endswith(self.end)


REASONING_FORMATS = {
    "think": ReasoningFormat("<think>", "</think>"),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
}
"""By the name that `--reasoning-parser` takes: `think` is DeepSeek's and Qwen's."""


class ReasoningParser:
    """Stands before another parser, which gets what is no reasoning.

    before ──opening marker──> inside ──closing marker──> behind
       └──────────anything else───────────────────────────^
    """

    def __init__(self, kind: ReasoningFormat, *, inside: bool) -> None:
        self._kind = kind
        self._step: Callable[[], list[Event] | None] = self._inside if inside else self._before
        self._pending = ""
        self._trim = inside

    @property
    def reasoning(self) -> bool:
        return self._step == self._inside

    def feed(self, text: str) -> list[Event]:
        """What is no reasoning comes as ContentDelta."""
        self._pending += text
        events: list[Event] = []
        while self._pending and (found := self._step()) is not None:
            events += found
        return events

    def finish(self) -> list[Event]:
        rest, self._pending = self._pending, ""
        if not rest:
            return []
        return [ReasoningDelta(rest.rstrip("\n")) if self._step == self._inside else ContentDelta(rest)]

    def _before(self) -> list[Event] | None:
        text, begin = self._pending.lstrip(), self._kind.begin
        if text.startswith(begin):
            self._pending, self._step, self._trim = text[len(begin) :], self._inside, True
            return []
        if begin.startswith(text):
            return None
        self._step, self._trim = self._behind, False
        return []

    def _inside(self) -> list[Event] | None:
        self._trim_lines()
        text, marker, rest = self._pending.partition(self._kind.end)
        if marker:
            self._pending, self._step, self._trim = rest, self._behind, True
            return [ReasoningDelta(text.rstrip("\n"))]
        return self._give_out(ReasoningDelta, len(text) - held_back(text, [self._kind.end]))

    def _behind(self) -> list[Event] | None:
        self._trim_lines()
        text, self._pending = self._pending, ""
        return [ContentDelta(text)] if text else None

    def _trim_lines(self) -> None:
        if self._trim:
            self._pending = self._pending.lstrip("\n")
            self._trim = not self._pending

    def _give_out(self, kind: type[ReasoningDelta], count: int) -> list[Event] | None:
        """The first `count` characters but the line ends before what is held back: the closing marker may follow them."""
        text = self._pending[:count].rstrip("\n")
        self._pending = self._pending[len(text) :]
        return [kind(text)] if text else None
