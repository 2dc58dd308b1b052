"""How answers are written: the frame that chat and text completions share, whole or as a stream of events.

Bodies are those of OpenAI's API reference. A stream and a whole answer are put together from the same deltas.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gantline_runtime.messages import FinishReason, PromptLogprobs, TokenLogprobs
from gantline_runtime.parsers.events import ContentDelta, Event
from gantline_runtime.server.errors import ApiError, json_response
from gantline_runtime.server.generation import Generation
from gantline_runtime.server.output import Delta, TokenEntry
from gantline_runtime.server.protocol import UsageEvents
from gantline_runtime.server.service import Service
from gantline_runtime.server.sse import DONE, EventStream, encode_event, unless_client_leaves
from gantline_runtime.tokenizer import Tokenizer

__all__ = ["AnswerWriter", "WholeChoice", "answer", "chosen_logprob", "finite_logprob", "token_logprobs"]

_encode = msgspec.json.Encoder().encode

_LOWEST_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON cannot say."""
_MANY_ITEMS = 256
_MANY_SCORES = 4096
"""To write them takes a tenth of a second, in which nobody else is to wait."""


@dataclass
class WholeChoice:
    """Deltas of one choice, put together."""

    pieces: list[str] = field(default_factory=list)
    entries: list[TokenEntry] = field(default_factory=list)
    tokens: list[tuple[int, TokenLogprobs | None]] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.pieces.append(delta.text)
        self.events.extend(delta.events if delta.events is not None else [ContentDelta(delta.text)])
        self.entries.extend(delta.entries)
        self.tokens.extend(delta.tokens)
        self.prompt_logprobs.extend(delta.prompt_logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def num_scores(self) -> int:
        """Tokens, of prompt and answer, whose log-probabilities are told."""
        return len(self.entries) + sum(len(chunk.chosen) for chunk in self.prompt_logprobs)


def _in_pieces(value: Any) -> Any:
    """`value` with the items of its long lists as JSON, so that it is not all written in one go, with Python's lock held."""
    if isinstance(value, dict):
        return {name: _in_pieces(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_in_pieces(item) for item in value] if len(value) <= _MANY_ITEMS else [msgspec.Raw(_encode(item)) for item in value]
    return value


class AnswerWriter:
    """`frame` holds the members that every object of the answer repeats: id, object, created, model."""

    ending = DONE
    """What a stream ends with when nothing failed."""

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        frame: dict[str, Any],
        *,
        usage_events: UsageEvents = "none",
        return_token_ids: bool = False,
    ) -> None:
        self.generation = generation
        self.tokenizer = tokenizer
        self.frame = frame
        self.usage_events = usage_events
        self.return_token_ids = return_token_ids

    def failure(self, error: ApiError) -> bytes:
        """A stream's last event, when something failed."""
        return encode_event(error.body())

    def build_opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its first text."""
        return None

    def build_chunks(self, index: int, delta: Delta) -> Iterable[dict[str, Any]]:
        """What a stream says of a delta: usually one chunk, none of a delta that shows nothing."""
        return [self.build_chunk(index, delta)] if self.shows(delta) else []

    def shows(self, delta: Delta) -> bool:
        """Whether `delta` has something for this client."""
        return delta.is_visible or (self.return_token_ids and bool(delta.tokens))

    def build_chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def build_choice(self, index: int, whole: WholeChoice) -> dict[str, Any]:
        raise NotImplementedError

    async def events(self, first: Sequence[tuple[int, Delta]]) -> AsyncGenerator[bytes, None]:
        """Events from the deltas `first` to the last; then the usage, if the client wants it."""
        for index in range(self.generation.num_choices):
            opening = self.build_opening(index)
            if opening is not None:
                yield self._event([opening])
        deltas = first
        while True:
            for index, delta in deltas:
                for chunk in self.build_chunks(index, delta):
                    yield self._event([chunk])
            if self.generation.finished:
                break
            deltas = await self.generation.next()
        if self.usage_events != "none":
            yield self._event([], self.generation.usage())

    async def whole(self, first: Sequence[tuple[int, Delta]]) -> dict[str, Any]:
        choices = await self.collect(first)
        if sum(choice.num_scores for choice in choices) > _MANY_SCORES:
            return await asyncio.to_thread(lambda: _in_pieces(self.build_whole(choices)))
        return self.build_whole(choices)

    def build_whole(self, choices: Sequence[WholeChoice]) -> dict[str, Any]:
        built = [self.build_choice(index, choice) for index, choice in enumerate(choices)]
        return {**self.frame, "choices": built, "usage": self.generation.usage()}

    async def collect(self, first: Sequence[tuple[int, Delta]]) -> list[WholeChoice]:
        """All choices, from the deltas `first` to the last."""
        choices = [WholeChoice() for _ in range(self.generation.num_choices)]
        deltas = first
        while True:
            for index, delta in deltas:
                choices[index].add(delta)
            if self.generation.finished:
                break
            deltas = await self.generation.next()
        return choices

    def add_token_ids(self, choice: dict[str, Any], tokens: Sequence[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        """`choice` with the numbers of its generated tokens, if the client wants them."""
        return {**choice, "token_ids": [token for token, _ in tokens]} if self.return_token_ids else choice

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body = {**self.frame, "choices": choices}
        if self.usage_events != "none":  # OpenAI: null in all events but the last
            body["usage"] = usage if self.usage_events == "last" else self.generation.usage()
        return encode_event(body)


async def answer(request: Request, service: Service, writer: AnswerWriter, *, stream: bool) -> Response:
    """The response to a generation that has begun. Whatever fails before the first token gets a status of its own, also for a stream."""
    generation = writer.generation
    request.state.generation = generation
    try:
        first = await unless_client_leaves(request, generation.next())
        if stream:
            return EventStream(writer.events(first), generation.close, ending=writer.ending, failure=writer.failure)  # which closes it
        response = json_response(await unless_client_leaves(request, writer.whole(first)))
    except BaseException:
        generation.close()
        raise
    generation.close()
    return response


def token_logprobs(entry: TokenEntry) -> list[tuple[int, float]]:
    """The likeliest tokens at one position, with their log-probabilities."""
    assert entry.logprobs is not None, "the first token of a prompt has no rivals"
    return [(id, finite_logprob(value)) for id, value in zip(entry.logprobs.top_ids, entry.logprobs.top_logprobs, strict=True)]


def chosen_logprob(entry: TokenEntry) -> float:
    assert entry.logprobs is not None, "the first token of a prompt has no log-probability"
    return finite_logprob(entry.logprobs.chosen)


def finite_logprob(value: float) -> float:
    return value if value > _LOWEST_LOGPROB else _LOWEST_LOGPROB
