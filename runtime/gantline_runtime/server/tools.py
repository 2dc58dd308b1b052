"""Tools that a model may call: what a request's choice comes to, and the grammar that holds the model to it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gantline_runtime.parsers.tool_formats import ToolFormat
from gantline_runtime.server.errors import ApiError
from gantline_runtime.server.json_schema import prepare_schema
from gantline_runtime.server.protocol_formats import AllowedChoice, NamedChoice, Tool, ToolChoice
from gantline_runtime.server.structured import Format, json_format, literal_formats, sequence

__all__ = ["ToolUse", "calls_format", "free_or_calls_format", "new_tool_call", "plan_tool_use"]


@dataclass(frozen=True)
class ToolUse:
    """What a request's tools come to."""

    described: msgspec.Raw
    """All of them as templates expect them, in MessagePack."""
    schemas: Mapping[str, msgspec.Raw]
    """Of the arguments of each tool that may be called, by its name, in JSON."""
    strict: bool
    """Whether calls are to match their schemas, also where the model decides whether to call."""
    held: bool
    """A grammar holds the model to calls, and only to calls."""
    parallel: bool


def plan_tool_use(tools: Sequence[Tool], choice: ToolChoice | None, *, parallel: bool) -> ToolUse | None:
    """None where no tool may be called. Raises ApiError for a choice without its tool, names that are not unique, and wrong schemas."""
    schemas: dict[str, msgspec.Raw] = {}
    for i, tool in enumerate(tools):
        if tool.function.name in schemas:
            message = f"Two tools are named {tool.function.name!r}."
            raise ApiError(400, message, code="invalid_value", param=f"tools[{i}].function.name")
        schemas[tool.function.name] = msgspec.Raw(msgspec.json.encode(_prepare_arguments(tool, f"tools[{i}].function.parameters")))
    if not tools and choice not in (None, "none", "auto"):
        raise ApiError(400, "tool_choice asks for a call, but there are no tools.", code="invalid_value", param="tool_choice")
    if not tools or choice == "none":
        return None
    chosen, held = schemas, choice == "required"
    if isinstance(choice, NamedChoice):
        chosen, held, parallel = {choice.function.name: _schema_of(choice, schemas, "tool_choice")}, True, False
    if isinstance(choice, AllowedChoice):
        allowed = enumerate(choice.allowed_tools.tools)
        chosen = {tool.function.name: _schema_of(tool, schemas, f"tool_choice.allowed_tools.tools[{i}]") for i, tool in allowed}
        held = choice.allowed_tools.mode == "required"
    strict = any(tool.function.strict for tool in tools if tool.function.name in chosen)
    return ToolUse(_describe(tools), chosen, strict=strict, held=held, parallel=parallel)


def _describe(tools: Sequence[Tool]) -> msgspec.Raw:
    try:
        return msgspec.Raw(msgspec.msgpack.encode([tool.for_template() for tool in tools]))
    except OverflowError as error:  # integers of more than 64 bits
        raise ApiError(400, f"tools: no template can be told of them: {error}.", code="invalid_value", param="tools") from None


def _schema_of(choice: NamedChoice, schemas: Mapping[str, msgspec.Raw], param: str) -> msgspec.Raw:
    name = choice.function.name
    if name not in schemas:
        message = f"{param} names {name!r}, which is not among the tools."
        raise ApiError(400, message, code="invalid_value", param=f"{param}.function.name")
    return schemas[name]


def _prepare_arguments(tool: Tool, param: str) -> Any:
    schema = tool.arguments_schema
    if schema.get("type", "object") != "object" or ("type" not in schema and schema.keys() & {"$ref", "anyOf", "oneOf", "allOf"}):
        message = f"{param}: arguments are an object; give its schema type: 'object'."
        raise ApiError(400, message, code="invalid_value", param=f"{param}.type")
    return prepare_schema({"type": "object", **schema}, param, strict=bool(tool.function.strict))


def new_tool_call(name: str, arguments: str, id_length: int) -> dict[str, Any]:
    """A call as clients get it, with an identifier of its own: of `id_length` letters and digits where the model's template insists."""
    token = uuid.uuid4().hex
    call_id = token[:id_length] if id_length else f"call_{token[:24]}"
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls_format(kind: ToolFormat, use: ToolUse, special_tokens: Mapping[str, int]) -> Format:
    """One call or several of what `use` allows, written as `kind` has it, and nothing else. `special_tokens`: numbers by text."""
    return sequence(_block(kind, use, special_tokens, several=use.parallel))


def free_or_calls_format(kind: ToolFormat, use: ToolUse, special_tokens: Mapping[str, int]) -> Format | None:
    """Free text, in which whatever begins a block goes on as one. None for a format whose blocks begin like any text."""
    if kind.only_at_start:
        return None
    marker, *rest = _block(kind, use, special_tokens, several=use.parallel and bool(kind.opening))
    again = use.parallel and not kind.opening
    if marker["type"] == "token":
        return {"type": "token_dispatch", "rules": [[marker["token"], sequence(rest)]], "loop": again}
    (begin,) = kind.begins
    after = {"type": "const_string", "value": marker["value"].removeprefix(begin)}
    return {"type": "dispatch", "rules": [[begin, sequence([after, *rest] if after["value"] else rest)]], "loop": again}


def _block(kind: ToolFormat, use: ToolUse, special_tokens: Mapping[str, int], *, several: bool) -> list[Format]:
    """The parts of a block; the first is, or begins with, the marker of formats that have one."""

    def literal(text: str) -> list[Format]:
        return literal_formats(text, special_tokens)

    named = _any_of([sequence([*literal(name + kind.after_name), json_format(schema)]) for name, schema in use.schemas.items()])
    call = [*literal(kind.before_name), named, *literal(kind.after_arguments)]
    more = [{"type": "star", "content": sequence([*literal(kind.separator), *call])}] if several else []
    return [*literal(kind.opening), *call, *more, *literal(kind.closing)]


def _any_of(formats: list[Format]) -> Format:
    return formats[0] if len(formats) == 1 else {"type": "or", "elements": formats}
