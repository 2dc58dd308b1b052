"""What a pipeline (`offline.py`) makes of a prompt: an answer, piece by piece, or a score."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gantline_runtime.messages import EngineRequest, FinishReason, SamplingParams, TokenLogprobs, TokenOutput
from gantline_runtime.server.output import ChoiceOutput

__all__ = ["Answer", "Response", "Score", "append", "build_reading"]


@dataclass
class Response:
    """An answer, or in a stream the piece that was added: `text`, `token_ids` and `logprobs` are the piece's, counts are those so far."""

    text: str = ""
    generate_token_len: int = 0
    input_token_len: int = 0
    finish_reason: FinishReason | None = None
    """`stop`, `length`; None while the answer goes on."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    index: int = 0
    """Which prompt of the batch it answers."""
    cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache had."""


@dataclass
class Answer:
    """The tokens of one prompt's answer become text here."""

    index: int
    num_prompt_tokens: int
    output: ChoiceOutput

    @property
    def ended(self) -> bool:
        return self.output.finish_reason is not None

    def take(self, output: TokenOutput) -> Response:
        delta = self.output.feed([output])
        return Response(
            text=delta.text,
            generate_token_len=self.output.num_tokens,
            input_token_len=self.num_prompt_tokens,
            finish_reason=delta.finish_reason,
            token_ids=list(output.token_ids),
            logprobs=[entry.logprobs for entry in delta.entries if entry.logprobs is not None] if output.logprobs else None,
            index=self.index,
            cached_tokens=self.output.num_cached_tokens,
        )


def append(answer: Response, part: Response) -> None:
    """Add a stream's next piece to what came before it."""
    answer.text += part.text
    answer.token_ids += part.token_ids
    if part.logprobs is not None:
        answer.logprobs = [*(answer.logprobs or []), *part.logprobs]
    for name in ("generate_token_len", "input_token_len", "finish_reason", "cached_tokens"):
        setattr(answer, name, getattr(part, name))


def build_reading(ids: list[int]) -> EngineRequest:
    """A request that only scores its prompt."""
    return EngineRequest(request_id="", prompt_ids=ids, sampling=SamplingParams(max_new_tokens=0), num_prompt_logprobs=0)


@dataclass
class Score:
    """What a text's tokens after the first have cost so far."""

    index: int
    total: float = 0.0
    count: int = 0
    ended: bool = False

    @property
    def loss(self) -> float:
        return self.total / self.count

    def take(self, output: TokenOutput) -> None:
        self.ended = output.finish_reason is not None
        if output.prompt_logprobs is not None:
            self.total -= math.fsum(output.prompt_logprobs.chosen)
            self.count += len(output.prompt_logprobs.chosen)
