"""One request on its way through the gateway: what it asks, what is known of it, and what became of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from gantline_runtime.prompt_prefixes import PromptPrefixes

from gantline_gateway.answer import Answer
from gantline_gateway.bodies import BodyShare
from gantline_gateway.catalog import Service
from gantline_gateway.question import Question
from gantline_gateway.traffic import Usage

__all__ = ["Exchange", "ExchangeMiddleware", "Handler"]


@dataclass
class Exchange:
    """Filled from top to bottom. `state` is the ASGI scope's, where middleware of the whole application leaves what it found out."""

    request_id: str
    path: str
    """With the query, as the client sent it."""
    headers: dict[str, str]
    """What the replica will get."""
    body: bytes
    question: Question
    service: Service
    answer: Answer
    share: BodyShare
    state: dict[str, Any]
    began_at: float
    """Monotonic seconds."""
    prefixes: PromptPrefixes | None = None
    """What the prompt begins with, once somebody has asked for it."""
    session: bytes = b""
    """Names the conversation, empty where the client does not."""
    replica: str = ""
    """Who answered, or was asked last."""
    attempts: int = 0
    held_s: float = 0.0
    usage: Usage = field(default_factory=Usage)
    """Final once the exchange is over, also where the client left: then as far as it went."""
    outcome: str = ""
    """Of the closed set in docs/gateway.md, once the exchange is over."""

    def drop_body(self) -> None:
        """Nobody will be sent it again."""
        self.body = b""
        self.share.release()


Handler = Callable[[Exchange], Awaitable[None]]
ExchangeMiddleware = Callable[[Exchange, Handler], Awaitable[None]]
"""Around every request that names a service, after its body was read and before a replica is looked for: raise ApiError to refuse, change
`exchange.headers`, call the handler, and read `exchange.usage` when it returned or raised. It is cancelled when the client leaves."""
