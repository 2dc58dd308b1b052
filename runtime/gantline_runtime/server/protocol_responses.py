"""Bodies of /v1/responses, and how they become a chat: one machinery makes answers, whichever endpoint asks.

What would need answers to be stored (`store: true`, `previous_response_id`, `conversation`, references to items) is refused by name:
replicas come and go, so the conversation belongs to the client, who gives earlier items as input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gantline_runtime.server.parameters import UNSUPPORTED_EXTRAS, UNSUPPORTED_RESPONSES, drop_harmless, unsupported, unsupported_value
from gantline_runtime.server.protocol import MAX_MESSAGES, MAX_TOKENS, MAX_TOP_LOGPROBS, Body, SamplingFields, check_parts, invalid

__all__ = ["ResponsesRequest"]

_LOGPROBS = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"
"""What clients of OpenAI's ask for where answers are not stored, to give the reasoning back. Here it stands in the items as it is."""
_NOT_STORED = "This server stores no answers; give the earlier items as input."
_ECHOED_ITEM = ("id", "status", "phase", "namespace", "caller")
"""Members of items that clients send back as they got them; none of them is part of the prompt."""


class _Part(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _as_it_came(cls, body: Any) -> Any:
        if isinstance(body, dict) and isinstance(body.get("type"), str) and body["type"] not in ("input_text", "output_text", "text"):
            raise unsupported_value(f"Content of type {body['type'][:40]!r}", "This model takes text only.")
        return drop_harmless(body, {}, ("annotations", "logprobs"))


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


_Content = Annotated[list[_Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[_Part]), Field(max_length=MAX_MESSAGES)]


def _text(parts: Iterable[_Part]) -> list[dict[str, str]]:
    return [{"type": "text", "text": part.text} for part in parts]


_NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": ("content",),
}


class _Item(Body):
    """One item of the input. Which members belong to which type is checked below, so that errors name the member and not a union."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: _Content | None = None
    call_id: str | None = Field(None, max_length=256)
    name: str | None = Field(None, max_length=256)
    arguments: str | None = None
    output: _Content | None = None
    summary: list[Any] = Field([], max_length=MAX_MESSAGES)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kind = body.get("type")
        if kind == "item_reference":
            raise unsupported_value("A reference to an item", _NOT_STORED)
        if isinstance(kind, str) and kind not in ("message", "function_call", "function_call_output", "reasoning"):
            raise unsupported_value(f"Input of type {kind[:40]!r}", "Messages, function calls and their outputs, and reasoning are.")
        if kind == "reasoning":
            told = body.get("content") or body.get("summary")  # other servers give a summary alone
            body = {**body, "content": [{"type": "text", "text": part.get("text")} for part in _dicts(told)]}
            return drop_harmless(body, {"encrypted_content": ()}, _ECHOED_ITEM)
        return drop_harmless(body, {}, _ECHOED_ITEM)

    @model_validator(mode="after")
    def _has_its_members(self) -> Self:
        for name in _NEEDED[self.type]:
            if getattr(self, name) is None:
                raise invalid(f"An item of type {self.type} needs {name}.", name)
        return self


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    yield from (part for part in (value if isinstance(value, list) else ()) if isinstance(part, dict))


class _Format(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        members = {"name": self.name, "description": self.description, "schema": self.json_schema, "strict": self.strict}
        return {"type": self.type, "json_schema": {name: value for name, value in members.items() if value is not None}}


class _TextSettings(Body):
    format: _Format = Field(default_factory=lambda: _Format.model_validate({}))

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        return drop_harmless(body, {"verbosity": ("medium",)}, ())


class _Reasoning(Body):
    effort: str | None = Field(None, max_length=32)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        return drop_harmless(body, {"summary": ("auto",), "generate_summary": ("auto",), "context": ("auto",), "mode": ("standard",)}, ())


class _FunctionTool(Body):
    type: Literal["function"]
    name: str = Field(max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if isinstance(body, dict) and isinstance(body.get("type"), str) and body["type"] != "function":
            raise unsupported_value(f"A tool of type {body['type'][:40]!r}", "Functions are, which the client runs itself.")
        return drop_harmless(body, {"defer_loading": (False,), "output_schema": (), "allowed_callers": (["direct"],)}, ())

    def for_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


def _check_included(value: Any) -> Any:
    if isinstance(value, str) and value not in (_LOGPROBS, _ENCRYPTED):
        raise unsupported_value(f"To include {value[:64]!r}", f"Only {_LOGPROBS} is.")
    return value


class ResponsesRequest(SamplingFields):
    input: Annotated[
        list[_Item], BeforeValidator(_as_items, json_schema_input_type=str | list[_Item]), Field(min_length=1, max_length=MAX_MESSAGES)
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    include: list[Annotated[Literal["message.output_text.logprobs", "reasoning.encrypted_content"], BeforeValidator(_check_included)]] = (
        Field([], max_length=8)
    )
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    text: _TextSettings = Field(default_factory=lambda: _TextSettings.model_validate({}))
    reasoning: _Reasoning = Field(default_factory=lambda: _Reasoning.model_validate({}))
    tools: list[_FunctionTool] = Field([], max_length=512)
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = Field({}, max_length=16)
    chat_template_kwargs: dict[Annotated[str, Field(max_length=128)], Any] = Field({}, max_length=64)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for name in ("previous_response_id", "conversation"):
                if body.get(name) is not None:
                    raise unsupported(name, _NOT_STORED)
        kept = drop_harmless(body, UNSUPPORTED_EXTRAS | UNSUPPORTED_RESPONSES)
        if isinstance(kept, dict) and isinstance(body.get("metadata"), dict):
            kept["metadata"] = body["metadata"]  # harmless elsewhere, but here the answer repeats it
        return kept

    @model_validator(mode="after")
    def _has_no_more_parts_than_a_chat_may(self) -> Self:
        check_parts(self.input, "input")
        return self

    def for_chat(self) -> dict[str, Any]:
        """The body of the chat request that means the same."""
        shared = {name: getattr(self, name) for name in SamplingFields.model_fields if name in self.model_fields_set}
        body: dict[str, Any] = {**shared, "messages": self._messages(), "chat_template_kwargs": self.chat_template_kwargs}
        if self.max_output_tokens is not None:
            body["max_completion_tokens"] = self.max_output_tokens
        if self.top_logprobs or _LOGPROBS in self.include:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.text.format.type != "text":
            body["response_format"] = self.text.format.for_chat()
        if self.reasoning.effort is not None:
            body["reasoning_effort"] = self.reasoning.effort
        if self.tools:
            body["tools"] = [tool.for_chat() for tool in self.tools]
        if self.tools or self.tool_choice not in ("auto", "none"):
            body["tool_choice"] = _choice_for_chat(self.tool_choice)
        if self.parallel_tool_calls is not None:
            body["parallel_tool_calls"] = self.parallel_tool_calls
        return body

    def without_form(self) -> Self:
        """All but what is asked of the answer's form."""
        nothing = {"tools": [], "text": _TextSettings.model_validate({}), "response_format": None, "structured_outputs": None}
        return self.model_copy(update=nothing)

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.input:
            _append(messages, item)
        return messages


def _append(messages: list[dict[str, Any]], item: _Item) -> None:
    """Add an item to the chat. What an assistant said, thought and called in one turn is one message there."""
    if item.type == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output or ())})
    elif item.type == "message" and item.role != "assistant":
        messages.append({"role": item.role, "content": _text(item.content or ())})
    else:
        turn = _assistant_turn(messages)
        if item.type == "reasoning":
            turn["reasoning_content"] = turn.get("reasoning_content", "") + "".join(part.text for part in item.content or ())
        elif item.type == "message":
            turn["content"] = [*turn.get("content", ()), *_text(item.content or ())]
        else:
            call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
            turn["tool_calls"] = [*turn.get("tool_calls", ()), call]


def _assistant_turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    return messages[-1]


def _choice_for_chat(choice: str | dict[str, Any]) -> Any:
    """The same choice of tools as chat completions nest it."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {key: value for key, value in choice.items() if key != "type"}}
    if choice.get("type") == "allowed_tools":
        tools = [_choice_for_chat(tool) for tool in _dicts(choice.get("tools"))]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": tools}}
    return choice
