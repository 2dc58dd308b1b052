"""One parser from several: reasoning first, what is none of it goes to the next."""

from __future__ import annotations

from collections.abc import Iterable

from gantline_runtime.parsers.events import ContentDelta, Event, OutputParser

__all__ = ["ChainedParser"]


class ChainedParser:
    """The content that `first` finds is read by `second`."""

    def __init__(self, first: OutputParser, second: OutputParser) -> None:
        self._first, self._second = first, second

    @property
    def reasoning(self) -> bool:
        return self._first.reasoning

    def feed(self, text: str) -> list[Event]:
        return self._pass_on(self._first.feed(text))

    def finish(self) -> list[Event]:
        return [*self._pass_on(self._first.finish()), *self._second.finish()]

    def _pass_on(self, events: Iterable[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            found += self._second.feed(event.text) if isinstance(event, ContentDelta) else [event]
        return found
