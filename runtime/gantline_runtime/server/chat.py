"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gantline_runtime.server.answers import AnswerWriter, WholeChoice, answer, chosen_logprob, token_logprobs
from gantline_runtime.server.body import parse_body
from gantline_runtime.server.generation import Generation
from gantline_runtime.server.output import Delta, TokenEntry
from gantline_runtime.server.protocol import ChatRequest
from gantline_runtime.server.sampling import num_new_tokens
from gantline_runtime.server.service import Model, Service, Ticket, new_request_id
from gantline_runtime.server.sse import unless_client_leaves

__all__ = ["ChatWriter", "create_chat_completion", "start_chat"]


async def create_chat_completion(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_state()
    fields = await parse_body(request, ChatRequest, service.config.max_body_bytes)
    model = service.check_state()
    service.check_model_name(fields.model)
    ticket = service.admit(fields.n)
    request_id = new_request_id("chatcmpl")
    try:
        generation = await unless_client_leaves(request, start_chat(service, model, request_id, fields, ticket))
    except BaseException:
        ticket.release()
        raise
    kind = "chat.completion.chunk" if fields.stream else "chat.completion"
    frame = {"id": request_id, "object": kind, "created": int(time.time()), "model": model.name}
    return await answer(request, service, ChatWriter(generation, model, frame, fields), stream=fields.stream)


async def start_chat(service: Service, model: Model, request_id: str, fields: ChatRequest, ticket: Ticket) -> Generation:
    prompt = await service.encode_chat(fields.messages, fields.chat_template_kwargs)
    wanted = fields.max_completion_tokens if fields.max_completion_tokens is not None else fields.max_tokens
    sampling = await service.build_sampling(
        fields,
        max_new_tokens=num_new_tokens(wanted, len(prompt), service.session_len, default=None, param="messages"),
        num_logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
    )
    return service.start(request_id, [prompt], [sampling], fields, ticket)


class ChatWriter(AnswerWriter):
    def __init__(self, generation: Generation, model: Model, frame: dict[str, Any], fields: ChatRequest) -> None:
        super().__init__(generation, model.tokenizer, frame, include_usage=fields.include_usage, return_token_ids=fields.return_token_ids)
        self._wants_logprobs = fields.logprobs

    def build_opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def build_chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text else {}
        logprobs = self._logprobs(delta.entries) if delta.entries else None
        choice = {"index": index, "delta": content, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        return self.add_token_ids(choice, delta.tokens)

    def build_choice(self, index: int, whole: WholeChoice) -> dict[str, Any]:
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        logprobs = self._logprobs(whole.entries) if self._wants_logprobs else None
        choice = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": whole.finish_reason}
        return self.add_token_ids(choice, whole.tokens)

    def _logprobs(self, entries: Sequence[TokenEntry]) -> dict[str, Any]:
        content = [
            {
                **self._token(entry.token_id, chosen_logprob(entry)),
                "top_logprobs": [self._token(id, value) for id, value in token_logprobs(entry)],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        """`bytes` lets a client put characters together that are spread over several tokens."""
        return {"token": self.tokenizer.token_text(token_id), "logprob": logprob, "bytes": list(self.tokenizer.token_bytes(token_id))}
