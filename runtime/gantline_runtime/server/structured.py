"""What an answer must match, as one grammar: from `response_format` as OpenAI and LMDeploy have it, `structured_outputs` as vLLM has it.

Grammars are xgrammar's structural tags; a `Format` is the inner part of one. Tool calls are written the same way (`tools.py`), and both
can be preceded by free text, such as a model's reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gantline_runtime.server.errors import ApiError
from gantline_runtime.server.json_schema import prepare_schema
from gantline_runtime.server.protocol_formats import ResponseFormat, StructuredOutputs

__all__ = ["Constraint", "Format", "build_constraint", "json_format", "literal_formats", "sequence"]

_MAX_WHITESPACE = 8
"""Characters of white space between two parts of a JSON text: enough to indent, too few to go on for ever."""

Format = dict[str, Any]


@dataclass(frozen=True)
class Constraint:
    """`param` is the field that asks for it, for errors."""

    format: Format
    param: str

    @property
    def grammar(self) -> str:
        """As the engine takes it. The order of keys counts: properties are generated in it."""
        return msgspec.json.encode({"type": "structural_tag", "format": self.format}).decode()


def json_format(schema: dict[str, Any] | bool | msgspec.Raw) -> Format:
    """JSON that matches `schema`, which is held as its text."""
    return {"type": "json_schema", "json_schema": msgspec.Raw(msgspec.json.encode(schema)), "max_whitespace_cnt": _MAX_WHITESPACE}


def sequence(elements: Sequence[Format]) -> Format:
    return elements[0] if len(elements) == 1 else {"type": "sequence", "elements": list(elements)}


def literal_formats(text: str, special_tokens: Mapping[str, int]) -> list[Format]:
    """Exactly `text`, with the special tokens in it as such: models have learnt them, not their spelling."""
    pattern = "|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True))
    pieces = re.split(f"({pattern})", text) if pattern else [text]
    return [
        {"type": "token", "token": special_tokens[piece]} if piece in special_tokens else {"type": "const_string", "value": piece}
        for piece in pieces
        if piece
    ]


def build_constraint(response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None) -> Constraint | None:
    """Raises ApiError for a schema that is wrong or, where it must be followed strictly, says what cannot be enforced."""
    wanted = _from_response_format(response_format) if response_format is not None else None
    if structured_outputs is None:
        return wanted
    if wanted is not None:
        message = "response_format and structured_outputs both say what the answer must match; give one."
        raise ApiError(400, message, code="invalid_value", param="structured_outputs")
    return _from_structured_outputs(structured_outputs)


def _from_response_format(wanted: ResponseFormat) -> Constraint | None:
    if wanted.json_schema is not None:
        param = "response_format.json_schema.schema"
        schema = True if wanted.json_schema.schema_ is None else wanted.json_schema.schema_
        return Constraint(json_format(prepare_schema(schema, param, strict=bool(wanted.json_schema.strict))), param)
    if wanted.regex_schema is not None:
        return Constraint({"type": "regex", "pattern": wanted.regex_schema}, "response_format.regex_schema")
    return Constraint(json_format({"type": "object"}), "response_format") if wanted.type == "json_object" else None


def _from_structured_outputs(wanted: StructuredOutputs) -> Constraint:
    if wanted.json_ is not None:
        return Constraint(json_format(prepare_schema(wanted.json_, "structured_outputs.json", strict=False)), "structured_outputs.json")
    if wanted.regex is not None:
        return Constraint({"type": "regex", "pattern": wanted.regex}, "structured_outputs.regex")
    if wanted.choice is not None:
        options = [{"type": "const_string", "value": text} for text in wanted.choice]
        return Constraint({"type": "or", "elements": options}, "structured_outputs.choice")
    return Constraint({"type": "grammar", "grammar": wanted.grammar}, "structured_outputs.grammar")
