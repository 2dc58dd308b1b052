"""POST /v1/responses: OpenAI's newer interface over the same chat. Answers are made as chat chunks and told here as items and typed events,
whole or as a stream from the same state machine."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gantline_runtime.server.answers import AnswerWriter, answer
from gantline_runtime.server.chat import ChatWriter, start_chat
from gantline_runtime.server.errors import ApiError
from gantline_runtime.server.generation import Generation
from gantline_runtime.server.output import Delta
from gantline_runtime.server.protocol import ChatRequest
from gantline_runtime.server.protocol_responses import ResponsesRequest
from gantline_runtime.server.response_form import as_chat, renamed, repeated, take_response_form
from gantline_runtime.server.response_items import ResponseItems
from gantline_runtime.server.service import Model, Service, new_request_id
from gantline_runtime.server.sse import encode_event, unless_client_leaves

__all__ = ["create_response"]

_MANY_ITEMS = 100
"""To write them as a chat takes some 60 us each."""


async def create_response(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_state()
    fields, prefixes, form = await service.bodies.parse_prompt(request, ResponsesRequest, take_response_form)
    model = service.check_state()
    service.check_model_name(fields.model)
    request_id = new_request_id("resp")
    ticket = service.admit(1)
    try:
        chat = await service.in_thread(lambda: as_chat(fields)) if len(fields.input) > _MANY_ITEMS else as_chat(fields)
        asked = form.answer if form is not None else None
        _, generation = await unless_client_leaves(request, start_chat(service, model, request_id, chat, ticket, prefixes, asked))
    except ApiError as error:
        ticket.release()
        raise renamed(error) from None
    except BaseException:
        ticket.release()
        raise
    frame = _frame(request_id, model, fields, form.repeated if form is not None else repeated(fields))
    return await answer(request, service, _ResponseWriter(generation, model, frame, chat), stream=fields.stream)


class _ResponseWriter(AnswerWriter):
    """Consumes the chunks that a chat's stream would have, so that whatever a chat can answer is told here too."""

    ending = b""

    def __init__(self, generation: Generation, model: Model, frame: dict[str, Any], chat: ChatRequest) -> None:
        super().__init__(generation, model.tokenizer, {})
        self._chat = ChatWriter(generation, model, {}, chat)
        self._items = ResponseItems(frame)

    async def events(self, first: Sequence[tuple[int, Delta]]) -> AsyncGenerator[bytes, None]:
        async for event in self._typed_events(first):
            yield encode_event(event, name=event["type"])

    async def whole(self, first: Sequence[tuple[int, Delta]]) -> dict[str, Any]:
        async for _ in self._typed_events(first):
            pass
        return self._items.response

    def failure(self, error: ApiError) -> bytes:
        event = self._items.fail(str(error), error.code or "server_error")
        return encode_event(event, name=event["type"])

    async def _typed_events(self, first: Sequence[tuple[int, Delta]]) -> AsyncGenerator[dict[str, Any], None]:
        for event in self._items.begin():
            yield event
        deltas, reason = first, "stop"
        while True:
            for chunk in self._chunks(deltas):
                reason = chunk["finish_reason"] or reason
                for event in self._items.take(chunk["delta"], (chunk.get("logprobs") or {}).get("content") or []):
                    yield event
            if self.generation.finished:
                break
            deltas = await self.generation.next()
        for event in self._items.end(reason, _usage(self.generation.usage())):
            yield event

    def _chunks(self, deltas: Sequence[tuple[int, Delta]]) -> Iterator[dict[str, Any]]:
        for index, delta in deltas:
            yield from self._chat.build_chunks(index, delta)


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": usage["total_tokens"],
    }


def _frame(request_id: str, model: Model, fields: ResponsesRequest, form: Mapping[str, Any]) -> dict[str, Any]:
    """The response before anything was generated: the request's settings, as OpenAI's repeats them. `form`: as `repeated`."""
    return {
        "id": request_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": fields.metadata,
        "model": model.name,
        "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": fields.reasoning.effort, "summary": None},
        "store": False,
        "temperature": fields.temperature if fields.temperature is not None else model.defaults.temperature,
        "text": form["text"],
        "tool_choice": fields.tool_choice,
        "tools": form["tools"],
        "top_logprobs": fields.top_logprobs or 0,
        "top_p": fields.top_p if fields.top_p is not None else model.defaults.top_p,
        "truncation": "disabled",
        "usage": None,
    }
