"""What a responses request means as a chat, what it asks of its answer's form, and what its answer repeats of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import pydantic

from gantline_runtime.server.answer_form import AnswerForm, read_form
from gantline_runtime.server.errors import ApiError, translate_validation
from gantline_runtime.server.protocol import ChatRequest
from gantline_runtime.server.protocol_responses import ResponsesRequest

__all__ = ["ResponseForm", "as_chat", "renamed", "repeated", "take_response_form"]

_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Fields of the chat, by the names that they have here."""


@dataclass(frozen=True)
class ResponseForm:
    answer: AnswerForm
    repeated: Mapping[str, msgspec.Raw]
    """As `repeated`, each member as its JSON text."""


def as_chat(fields: ResponsesRequest) -> ChatRequest:
    """Raises ApiError, with the chat's names."""
    try:
        return ChatRequest.model_validate(fields.for_chat())
    except pydantic.ValidationError as error:
        raise translate_validation(error) from None


def renamed(error: ApiError) -> ApiError:
    """The error with its field as this endpoint's clients know it."""
    if error.param is not None:
        first = error.param.split(".")[0].split("[")[0]
        param = "input" if first == "messages" else _NAMES.get(first, first) + error.param[len(first) :]
        error.param = param.replace("text.format.json_schema", "text.format").replace(".function.", ".")
    return error


def repeated(fields: ResponsesRequest) -> dict[str, Any]:
    """Members of the answer that repeat what was asked of its form."""
    return {
        "text": {"format": fields.text.format.model_dump(by_alias=True, exclude_none=True)},
        "tools": [tool.model_dump() for tool in fields.tools],
    }


def take_response_form(fields: ResponsesRequest) -> tuple[ResponsesRequest, ResponseForm]:
    """`fields` without what they ask of the answer's form, and that. Raises ApiError."""
    try:
        form = read_form(as_chat(fields))
    except ApiError as error:
        raise renamed(error) from None
    told = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in repeated(fields).items()}
    return fields.without_form(), ResponseForm(form, told)
