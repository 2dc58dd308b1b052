"""What a request wants of its answer's form, put together: the grammar for the engine, the parser for its text, the tools for the template.

                                 ┌─> Constraint (grammar) ──> engine
fields + what the model writes ──┼─> OutputParser ──> reasoning, content, calls
                                 └─> tools, as the template takes them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gantline_runtime.parsers.chain import ChainedParser
from gantline_runtime.parsers.events import OutputParser
from gantline_runtime.parsers.reasoning import REASONING_FORMATS, ReasoningFormat, ReasoningParser
from gantline_runtime.parsers.tool_calls import HeldToolParser, ToolParser
from gantline_runtime.parsers.tool_formats import TOOL_FORMATS, ToolFormat, choose_tool_format
from gantline_runtime.server.errors import ApiError
from gantline_runtime.server.structured import Constraint, Format, literal_formats, sequence
from gantline_runtime.server.tools import ToolUse, calls_format, free_or_calls_format
from gantline_runtime.tokenizer import Tokenizer

__all__ = ["PLAIN", "ModelFormats", "OutputPlan", "plan_output"]

_DEFAULT_TOOL_FORMAT = "hermes"
"""For a model of which nothing is known: held by a grammar, any model writes it."""


@dataclass(frozen=True)
class ModelFormats:
    """How a model writes reasoning and tool calls, by its chat template or by the server's settings."""

    tools: ToolFormat = TOOL_FORMATS[_DEFAULT_TOOL_FORMAT]
    takes_tools: bool = False
    """Whether the template tells the model of its tools."""
    reasoning: ReasoningFormat | None = None
    takes_effort: bool = False
    switches_thinking: bool = False
    """Whether the template knows the variables `reasoning_effort` and `enable_thinking`."""
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    """Numbers of the special tokens among the markers."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, tool_call_parser: str = "auto", reasoning_parser: str = "auto") -> ModelFormats:
        template = tokenizer.chat_template or ""
        tool_name = (choose_tool_format(template) or _DEFAULT_TOOL_FORMAT) if tool_call_parser == "auto" else tool_call_parser
        reasoning = next((kind for kind in REASONING_FORMATS.values() if kind.end in template), None)
        if reasoning_parser != "auto":
            reasoning = REASONING_FORMATS.get(reasoning_parser)
        tools = TOOL_FORMATS[tool_name]
        markers = (*tools.markers, *((reasoning.begin, reasoning.end) if reasoning is not None else ()))
        numbers = {marker: tokenizer.token_id(marker) for marker in markers}
        return cls(
            tools=tools,
            takes_tools="tools" in template,
            reasoning=reasoning,
            takes_effort="reasoning_effort" in template,
            switches_thinking="enable_thinking" in template,
            special_tokens={text: number for text, number in numbers.items() if number is not None and number in tokenizer.special_ids},
        )

    def variables(self, effort: str | None) -> dict[str, Any]:
        """What `reasoning_effort` means to the template. Raises ApiError if it means nothing."""
        if effort is None:
            return {}
        found: dict[str, Any] = {}
        if self.takes_effort:
            found["reasoning_effort"] = effort
        if self.switches_thinking:
            found["enable_thinking"] = effort != "none"
        if not found and (effort != "none" or self.reasoning is not None):
            message = "reasoning_effort: this model's chat template cannot be told how much to reason. Leave it out."
            raise ApiError(400, message, code="unsupported_parameter", param="reasoning_effort")
        return found


@dataclass(frozen=True)
class OutputPlan:
    """`shown_ids` are special tokens that the parser reads as text."""

    constraint: Constraint | None = None
    formats: ModelFormats | None = None
    use: ToolUse | None = None
    begins_inside: bool = False

    @property
    def shown_ids(self) -> frozenset[int]:
        return frozenset(self.formats.special_tokens.values()) if self.formats is not None and self._parses else frozenset()

    @property
    def _parses(self) -> bool:
        return self.formats is not None and (self.use is not None or self.formats.reasoning is not None)

    def make_parser(self) -> OutputParser | None:
        """A parser for one choice; None where all text is content."""
        if self.formats is None or not self._parses:
            return None
        tools: OutputParser | None = None
        if self.use is not None:
            kind = self.formats.tools
            tools = HeldToolParser(kind) if self.use.held else ToolParser(kind, self.use.schemas)
        if self.formats.reasoning is None:
            return tools
        reasoning = ReasoningParser(self.formats.reasoning, inside=self.begins_inside)
        return reasoning if tools is None else ChainedParser(reasoning, tools)


PLAIN = OutputPlan()


def plan_output(
    constraint: Constraint | None, *, formats: ModelFormats | None = None, use: ToolUse | None = None, prompt: str = "", min_tokens: int = 0
) -> OutputPlan:
    """`constraint` is of the answer's content; `prompt` the rendered one, whose end tells whether the model reasons already, or
    no more.

    Raises ApiError for a wish that cannot be fulfilled.
    """
    inside = formats is not None and formats.reasoning is not None and formats.reasoning.begins_inside(prompt)
    if use is not None and formats is not None:
        constraint = _with_calls(constraint, use, formats)
    if constraint is not None:
        if min_tokens:
            message = "min_tokens: where the answer ends is the grammar's to say. Leave it out."
            raise ApiError(400, message, code="invalid_value", param="min_tokens")
        if formats is not None and formats.reasoning is not None and not formats.reasoning.is_over(prompt):
            constraint = Constraint(_after_reasoning(constraint.format, formats, inside=inside), constraint.param)
    return OutputPlan(constraint, formats, use, inside)


def _with_calls(constraint: Constraint | None, use: ToolUse, formats: ModelFormats) -> Constraint | None:
    """Calls only, calls or what the constraint says, or anything, in which strict tools are called as their schemas say."""
    if use.held:
        return Constraint(calls_format(formats.tools, use, formats.special_tokens), "tools")
    if constraint is None:
        free = free_or_calls_format(formats.tools, use, formats.special_tokens) if use.strict else None
        return Constraint(free, "tools") if free is not None else None
    calls = calls_format(formats.tools, use, formats.special_tokens)
    return Constraint({"type": "or", "elements": [calls, constraint.format]}, constraint.param)


def _after_reasoning(then: Format, formats: ModelFormats, *, inside: bool) -> Format:
    """Reasoning in free text, then `then`: reasoning is no part of what a client wants constrained."""
    kind = formats.reasoning
    assert kind is not None
    begin, end = (literal_formats(marker, formats.special_tokens)[0] for marker in (kind.begin, kind.end))
    text = {"type": "tag", "begin": "" if inside else _tag_marker(begin), "content": {"type": "any_text"}, "end": _tag_marker(end)}
    lines = {"type": "regex", "pattern": "\\n{0,2}"}
    if inside:
        return sequence([text, lines, then])
    return sequence([{"type": "optional", "content": sequence([text, lines])}, then])


def _tag_marker(literal: Format) -> Any:
    """A tag's markers are texts, or tokens."""
    return literal["value"] if literal["type"] == "const_string" else literal
