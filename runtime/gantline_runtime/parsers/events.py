"""What parsers find in a model's text, in the order of the text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["ArgumentsDelta", "CallBegin", "ContentDelta", "Event", "OutputParser", "ReasoningDelta", "gather", "joined"]


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer that is meant for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of the tool `name`, the answer's `index`-th; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the arguments of call `index`: a JSON object, perhaps in several pieces."""

    index: int
    text: str


Event = ContentDelta | ReasoningDelta | CallBegin | ArgumentsDelta


class OutputParser(Protocol):
    """How text is cut into pieces makes no difference to what comes of it, but to how deltas are cut."""

    @property
    def reasoning(self) -> bool:
        """Whether the text is in the midst of reasoning."""
        ...

    def feed(self, text: str) -> list[Event]:
        """What `text` completes. What may be the beginning of something else is held back."""
        ...

    def finish(self) -> list[Event]:
        """What is left when no more text comes."""
        ...


def gather(events: Iterable[Event]) -> tuple[str, str, list[tuple[str, str]]]:
    """(content, reasoning, calls as name and arguments) of a whole answer."""
    content, reasoning = [], []
    calls: list[tuple[str, list[str]]] = []
    for event in events:
        match event:
            case ContentDelta():
                content.append(event.text)
            case ReasoningDelta():
                reasoning.append(event.text)
            case CallBegin():
                calls.append((event.name, []))
            case ArgumentsDelta():
                calls[-1][1].append(event.text)
    return "".join(content), "".join(reasoning), [(name, "".join(pieces)) for name, pieces in calls]


def joined(events: Iterable[Event]) -> list[Event]:
    """The same with deltas of one kind that follow each other put together, and without empty ones."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, CallBegin):
            result.append(event)
        elif not event.text:
            continue
        elif isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            result[-1] = ContentDelta(last.text + event.text)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            result[-1] = ReasoningDelta(last.text + event.text)
        elif isinstance(event, ArgumentsDelta) and isinstance(last, ArgumentsDelta) and last.index == event.index:
            result[-1] = ArgumentsDelta(last.index, last.text + event.text)
        else:
            result.append(event)
    return result
