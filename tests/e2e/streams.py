"""Clients that stream one answer after the other for as long as something goes on, and what became of each answer."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

from openai import APIError, OpenAI

__all__ = ["Ended", "Streams"]


@dataclass(frozen=True)
class Ended:
    """One stream. `how` is its finish reason, or what cut it off."""

    how: str
    seconds: float
    first_text_s: float
    """From the question to the first text: the wait for a replica is in it."""


@dataclass
class Streams:
    """`count` clients at once, answers of `tokens` tokens. Inside of the block they ask; at its end they finish what they have begun."""

    url: str
    count: int
    tokens: int
    api_key: str = "none"
    pause_s: float = 0.0
    """Of a client between two answers: an engine on a CPU takes all of one for as long as it is asked."""
    ended: list[Ended] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Streams:
        self._threads = [threading.Thread(target=self._ask_on, daemon=True) for _ in range(self.count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(300)
        assert not any(thread.is_alive() for thread in self._threads), "a stream does not end"

    def _ask_on(self) -> None:
        client = OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, timeout=300)
        while not self._stop.is_set():
            self.ended.append(self._ask(client))
            self._stop.wait(self.pause_s)

    def _ask(self, client: OpenAI) -> Ended:
        began, first_s, how = time.monotonic(), 0.0, "nothing"
        try:
            for chunk in client.completions.create(
                model="chat", prompt="The licence", max_tokens=self.tokens, stream=True, extra_body={"ignore_eos": True}
            ):
                first_s = first_s or time.monotonic() - began
                how = next((choice.finish_reason for choice in chunk.choices if choice.finish_reason), how)
        except APIError as error:
            how = f"error: {error.code or error}"
        return Ended(how, time.monotonic() - began, first_s)
