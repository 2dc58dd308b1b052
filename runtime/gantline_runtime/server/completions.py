"""POST /v1/completions"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gantline_runtime.server.answers import AnswerWriter, WholeChoice, answer, finite_logprob, token_logprobs
from gantline_runtime.server.body import parse_body
from gantline_runtime.server.errors import ApiError
from gantline_runtime.server.generation import Generation
from gantline_runtime.server.output import Delta, TokenEntry
from gantline_runtime.server.protocol import CompletionRequest
from gantline_runtime.server.sampling import build_sampling, num_new_tokens
from gantline_runtime.server.service import Model, Service, Ticket, new_request_id
from gantline_runtime.server.sse import unless_client_leaves

__all__ = ["create_completion"]

_DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this endpoint alone."""


async def create_completion(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_state()
    fields = await parse_body(request, CompletionRequest, service.config.max_body_bytes)
    model = service.check_state()
    service.check_model_name(fields.model)
    ticket = service.admit(len(fields.prompt) * fields.n)
    request_id = new_request_id("cmpl")
    try:
        generation, echoes = await unless_client_leaves(request, _start(service, model, request_id, fields, ticket))
    except BaseException:
        ticket.release()
        raise
    frame = {"id": request_id, "object": "text_completion", "created": int(time.time()), "model": model.name}
    return await answer(request, service, _CompletionWriter(generation, model, frame, fields, echoes), stream=fields.stream)


async def _start(
    service: Service, model: Model, request_id: str, fields: CompletionRequest, ticket: Ticket
) -> tuple[Generation, list[str]]:
    """The generation, and what `echo` puts before each choice."""
    prompts = [prompt if isinstance(prompt, list) else await service.encode(prompt, param="prompt") for prompt in fields.prompt]
    sampling = []
    for prompt in prompts:
        if not prompt:
            raise ApiError(400, "prompt: an empty text gives this model nothing to continue.", code="invalid_value", param="prompt")
        limit = num_new_tokens(fields.max_tokens, len(prompt), service.session_len, default=_DEFAULT_MAX_TOKENS, param="prompt")
        sampling.append(
            build_sampling(
                fields, model.defaults, max_new_tokens=limit, num_logprobs=fields.logprobs, vocab_size=model.tokenizer.vocab_size
            )
        )
    echoes = [await _echo(service, model, prompt) if fields.echo else "" for prompt in fields.prompt for _ in range(fields.n)]
    return service.start(request_id, prompts, sampling, fields, ticket), echoes


async def _echo(service: Service, model: Model, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else await service.in_thread(lambda: model.tokenizer.decode(prompt))


class _CompletionWriter(AnswerWriter):
    def __init__(
        self, generation: Generation, model: Model, frame: dict[str, Any], fields: CompletionRequest, echoes: Sequence[str]
    ) -> None:
        super().__init__(generation, model.tokenizer, frame, include_usage=fields.include_usage)
        self._wants_logprobs = fields.logprobs is not None
        self._echoes = echoes

    def build_opening(self, index: int) -> dict[str, Any] | None:
        return self._choice(index, self._echoes[index], None, None) if self._echoes[index] else None

    def build_chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        return self._choice(index, delta.text, self._logprobs(delta.entries) if delta.entries else None, delta.finish_reason)

    def build_choice(self, index: int, whole: WholeChoice) -> dict[str, Any]:
        logprobs = self._logprobs(whole.entries) if self._wants_logprobs else None
        return self._choice(index, self._echoes[index] + whole.text, logprobs, whole.finish_reason)

    @staticmethod
    def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, entries: Sequence[TokenEntry]) -> dict[str, Any]:
        """Offsets count characters of the choice's text; `echo` and logprobs exclude each other."""
        text = self.tokenizer.token_text
        return {
            "tokens": [text(entry.token_id) for entry in entries],
            "token_logprobs": [finite_logprob(entry.logprobs.chosen) for entry in entries],
            "top_logprobs": [{text(id): value for id, value in token_logprobs(entry)} for entry in entries],
            "text_offset": [entry.start for entry in entries],
        }
