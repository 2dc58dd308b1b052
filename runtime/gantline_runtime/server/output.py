"""From an engine's tokens to what a client sees of one choice: text, log-probabilities, the reason it ended.

    token ids ──> Detokenizer ──> StopStrings ──> OutputParser ──> Delta
                  (whole characters)  (no part of a stop string)  (reasoning, content, calls)

Streams and whole answers go through the same object, token by token, so they cannot differ, however the tokens were grouped on their way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import msgspec

from gantline_runtime.detokenizer import Detokenizer
from gantline_runtime.messages import FinishReason, PromptLogprobs, TokenLogprobs, TokenOutput
from gantline_runtime.parsers.events import Event, OutputParser, joined
from gantline_runtime.stop_strings import StopStrings
from gantline_runtime.tokenizer import Tokenizer

__all__ = ["ChoiceOutput", "Delta", "TokenEntry"]


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One token and its log-probabilities (None for the first of a prompt); its text begins at character `start` of the choice's text."""

    token_id: int
    logprobs: TokenLogprobs | None
    start: int


@dataclass(slots=True)
class Delta:
    """What was added. `entries` are of tokens whose text has been shown, `tokens` all that were generated, with their log-probabilities
    where asked for. `finish_reason` is set in a choice's last one."""

    text: str = ""
    entries: list[TokenEntry] = field(default_factory=list)
    tokens: list[tuple[int, TokenLogprobs | None]] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    events: list[Event] | None = None
    """What a parser found in the text; None where there is none, and all text is content."""
    finish_reason: FinishReason | None = None

    @property
    def is_visible(self) -> bool:
        return bool((self.text if self.events is None else self.events) or self.entries or self.finish_reason is not None)


class ChoiceOutput:
    """State of one choice.

    `stop_ids` end the text without being part of it, as stop strings do, unless `include_stop`. Before `min_tokens` tokens no stop string
    counts, as no end-of-sequence token does.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        stop_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        parser: OutputParser | None = None,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`shown_ids` are special tokens that are text, whatever `skip_special_tokens` says: `parser` reads them."""
        skipped = tokenizer.special_ids - shown_ids if skip_special_tokens else ()
        self._detokenizer = Detokenizer(tokenizer, prompt_ids, skipped)
        self._parser = parser
        self._stops = StopStrings(stop)
        self._stop_ids = stop_ids
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._entries: deque[TokenEntry] = deque()
        self._decoded = 0
        """Characters decoded so far, held back or not."""
        self._shown = 0
        self.num_tokens = 0
        """Tokens generated, with the one that ended the choice."""
        self.num_reasoning_tokens = 0
        self.num_cached_tokens = 0
        self.embedding = b""
        """The pooled hidden state, of a request that asked for it: float32, little-endian."""
        self.finish_reason: FinishReason | None = None

    def feed(self, outputs: Sequence[TokenOutput]) -> Delta:
        """Take what the engine sent. Once the delta has a finish reason, the engine's request may be closed."""
        delta = self._read(outputs)
        if self._parser is not None:
            last = self._parser.finish() if delta.finish_reason is not None else []
            delta.events = joined([*(delta.events or []), *last])
        return delta

    def feed_each(self, outputs: Sequence[TokenOutput]) -> list[Delta]:
        """As `feed`, with a delta for each token where log-probabilities stand beside parsed text: which of its parts a token belongs to
        must not depend on how tokens were grouped on their way."""
        if self._parser is None or not any(output.logprobs for output in outputs):
            return [self.feed(outputs)]
        deltas = []
        for output in chain.from_iterable(map(_one_by_one, outputs)):
            deltas.append(self.feed([output]))
            if self.finish_reason is not None:
                break
        return deltas

    def _read(self, outputs: Sequence[TokenOutput]) -> Delta:
        delta = Delta()
        for output in outputs:
            self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
            if output.prompt_logprobs is not None:
                delta.prompt_logprobs.append(output.prompt_logprobs)
            self.embedding = output.embedding or self.embedding
            last = len(output.token_ids) - 1
            for i, token in enumerate(output.token_ids):
                ends = output.finish_reason == "stop" and i == last and token in self._stop_ids
                self._take(token, output.logprobs[i] if output.logprobs else None, delta, ends=ends)
                if self.finish_reason is not None:
                    return delta
            if output.finish_reason is not None:
                self._end(output.finish_reason, delta)
                return delta
        return delta

    def _take(self, token: int, logprobs: TokenLogprobs | None, delta: Delta, *, ends: bool) -> None:
        self.num_tokens += 1
        delta.tokens.append((token, logprobs))
        if ends and not self._include_stop:
            return
        if logprobs is not None:
            self._entries.append(TokenEntry(token, logprobs, self._decoded))
        self._show(self._detokenizer.feed(token), delta)
        if self._parser is not None and self._parser.reasoning:
            self.num_reasoning_tokens += 1

    def _end(self, reason: FinishReason, delta: Delta) -> None:
        self._show(self._detokenizer.finish(), delta)
        if self.finish_reason is None:  # the last characters may have completed a stop string
            self._add(self._stops.finish(), delta)
            delta.entries.extend(self._entries)
            self._entries.clear()
            self.finish_reason = delta.finish_reason = reason

    def _add(self, text: str, delta: Delta) -> None:
        self._shown += len(text)
        delta.text += text
        if self._parser is not None and text:
            delta.events = [*(delta.events or []), *self._parser.feed(text)]

    def _show(self, piece: str, delta: Delta) -> None:
        if not piece:
            return
        self._decoded += len(piece)
        shown = piece if self.num_tokens <= self._min_tokens else self._stops.feed(piece)
        self._add(shown, delta)
        if self._stops.stopped:
            self.finish_reason = delta.finish_reason = "stop"
            if self._include_stop:
                self._add(self._stops.matched, delta)
        while self._entries and self._entries[0].start < self._shown:
            delta.entries.append(self._entries.popleft())


def _one_by_one(output: TokenOutput) -> Iterator[TokenOutput]:
    """The same tokens, an output for each; what is not of one token stays with the last."""
    for i in range(len(output.token_ids) - 1):
        logprobs = output.logprobs[i : i + 1] if output.logprobs else None
        yield TokenOutput(request_id=output.request_id, token_ids=output.token_ids[i : i + 1], logprobs=logprobs)
    yield msgspec.structs.replace(output, token_ids=output.token_ids[-1:], logprobs=output.logprobs[-1:] if output.logprobs else None)
