"""Fields of a request that say what its answer must be: `response_format`, `structured_outputs`, `tools` and those that go with them."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = ["AllowedChoice", "NamedChoice", "ReasoningEffort", "ResponseFormat", "StructuredOutputs", "Tool", "ToolCall", "ToolChoice"]

MAX_CHOICES = 1024
MAX_GRAMMAR_CHARS = 1 << 16
MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
_FUNCTION_NAME = r"^[A-Za-z0-9_.-]{1,128}$"

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class JsonSchema(_Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema", "regex_schema"]
    json_schema: JsonSchema | None = None
    regex_schema: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)] | None = None

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Self:
        for name in ("json_schema", "regex_schema"):
            if (self.type == name) != (getattr(self, name) is not None):
                raise ValueError(f"{name} must be given with type: {name!r}, and only then")
        return self


def _from_text(value: Any) -> Any:
    """A schema that is given as its JSON text. What is none is left, to be refused as what it is."""
    if isinstance(value, str):
        with contextlib.suppress(msgspec.DecodeError, RecursionError):
            return msgspec.json.decode(value)
    return value


_SchemaOrText = Annotated[dict[str, Any] | bool, BeforeValidator(_from_text, json_schema_input_type=dict[str, Any] | bool | str)]


class StructuredOutputs(_Strict):
    """One of four."""

    json_: _SchemaOrText | None = Field(None, alias="json")
    regex: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1, max_length=8192)]], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give exactly one of json, regex, choice and grammar")
        return self


class Function(_Strict):
    name: Annotated[str, Field(pattern=_FUNCTION_NAME)]
    description: Annotated[str, Field(max_length=1 << 16)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As templates expect it: `strict` says nothing to a model, and a function without parameters has an empty object of them."""
        function = {"name": self.function.name, "description": self.function.description or "", "parameters": self.arguments_schema}
        return {"type": "function", "function": function}

    @property
    def arguments_schema(self) -> dict[str, Any]:
        return self.function.parameters or {"type": "object", "properties": {}}


class FunctionName(_Strict):
    name: Annotated[str, Field(pattern=_FUNCTION_NAME)]


class NamedChoice(_Strict):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(_Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(_Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice


class CalledFunction(_Strict):
    name: Annotated[str, Field(max_length=256)]
    arguments: str = "{}"


class ToolCall(_Strict):
    """A call in an earlier answer."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction

    def for_template(self, *, arguments_as_text: bool) -> dict[str, Any]:
        """Raises ValueError where the arguments are not the JSON text of an object."""
        try:
            arguments = msgspec.json.decode(self.function.arguments or "{}")
        except RecursionError:
            raise ValueError("the arguments of a call are nested too deeply") from None
        except msgspec.DecodeError as error:
            raise ValueError(f"the arguments of a call are no JSON text: {str(error)[:100]}") from None
        if not isinstance(arguments, dict):
            raise ValueError("the arguments of a call are a JSON object, as text")
        function = {"name": self.function.name, "arguments": self.function.arguments if arguments_as_text else arguments}
        return {"type": "function", "function": function} | ({"id": self.id} if self.id is not None else {})
