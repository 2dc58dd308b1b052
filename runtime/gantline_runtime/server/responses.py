"""POST /v1/responses: OpenAI's newer interface over the same chat. Answers are made as chat chunks and told here as items and typed events,
whole or as a stream from the same state machine."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import pydantic
from starlette.requests import Request
from starlette.responses import Response

from gantline_runtime.server.answers import AnswerWriter, answer
from gantline_runtime.server.chat import ChatWriter, start_chat
from gantline_runtime.server.errors import ApiError, translate_validation
from gantline_runtime.server.generation import Generation
from gantline_runtime.server.output import Delta
from gantline_runtime.server.protocol import ChatRequest
from gantline_runtime.server.protocol_responses import ResponsesRequest
from gantline_runtime.server.response_items import ResponseItems
from gantline_runtime.server.service import Model, Service, new_request_id
from gantline_runtime.server.sse import encode_event, unless_client_leaves

__all__ = ["create_response"]

_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Fields of the chat, by the names that they have here."""


_MANY_ITEMS = 100
"""To write them as a chat takes some 60 us each."""


async def create_response(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_state()
    fields, prefixes = await service.bodies.parse_prompt(request, ResponsesRequest)
    model = service.check_state()
    service.check_model_name(fields.model)
    request_id = new_request_id("resp")
    ticket = service.admit(1)
    try:
        chat = await service.in_thread(lambda: _as_chat(fields)) if len(fields.input) > _MANY_ITEMS else _as_chat(fields)
        _, generation = await unless_client_leaves(request, start_chat(service, model, request_id, chat, ticket, prefixes))
    except ApiError as error:
        ticket.release()
        raise _renamed(error) from None
    except BaseException:
        ticket.release()
        raise
    return await answer(request, service, _ResponseWriter(generation, model, request_id, fields, chat), stream=fields.stream)


def _as_chat(fields: ResponsesRequest) -> ChatRequest:
    try:
        return ChatRequest.model_validate(fields.for_chat())
    except pydantic.ValidationError as error:
        raise translate_validation(error) from None


def _renamed(error: ApiError) -> ApiError:
    """The error with its field as this endpoint's clients know it."""
    if error.param is not None:
        first = error.param.split(".")[0].split("[")[0]
        param = "input" if first == "messages" else _NAMES.get(first, first) + error.param[len(first) :]
        error.param = param.replace("text.format.json_schema", "text.format").replace(".function.", ".")
    return error


class _ResponseWriter(AnswerWriter):
    """Consumes the chunks that a chat's stream would have, so that whatever a chat can answer is told here too."""

    ending = b""

    def __init__(self, generation: Generation, model: Model, request_id: str, fields: ResponsesRequest, chat: ChatRequest) -> None:
        super().__init__(generation, model.tokenizer, {})
        self._chat = ChatWriter(generation, model, {}, chat)
        self._items = ResponseItems(_frame(request_id, model, fields))

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


def _frame(request_id: str, model: Model, fields: ResponsesRequest) -> dict[str, Any]:
    """The response before anything was generated: the request's settings, as OpenAI's repeats them."""
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
        "text": {"format": fields.text.format.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": fields.tool_choice,
        "tools": [tool.model_dump() for tool in fields.tools],
        "top_logprobs": fields.top_logprobs or 0,
        "top_p": fields.top_p if fields.top_p is not None else model.defaults.top_p,
        "truncation": "disabled",
        "usage": None,
    }
