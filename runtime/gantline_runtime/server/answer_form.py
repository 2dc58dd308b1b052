"""What a request asks of its answer's form: a grammar, and tools.

Schemas and tools of megabytes are hundreds of thousands of objects, which take seconds to judge and tenths of one to be handed on. So this
is worked out beside the event loop, where a long body is read (`body_process.py`) or else in a thread, and is held as text from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from gantline_runtime.server.protocol import ChatRequest, SamplingFields
from gantline_runtime.server.structured import Constraint, build_constraint
from gantline_runtime.server.tools import ToolUse, plan_tool_use

__all__ = ["AnswerForm", "is_plain", "read_form", "take_form"]

F = TypeVar("F", bound=SamplingFields)


@dataclass(frozen=True)
class AnswerForm:
    constraint: Constraint | None = None
    use: ToolUse | None = None


def read_form(fields: SamplingFields) -> AnswerForm:
    """Raises ApiError for what is wrong, or cannot be enforced where it must be."""
    constraint = build_constraint(fields.response_format, fields.structured_outputs)
    if not isinstance(fields, ChatRequest):
        return AnswerForm(constraint)
    return AnswerForm(constraint, plan_tool_use(fields.tools, fields.tool_choice, parallel=fields.parallel_tool_calls))


def take_form(fields: F) -> tuple[F, AnswerForm]:
    """`fields` without what `read_form` reads, and what it has read."""
    nothing: dict[str, Any] = {"response_format": None, "structured_outputs": None}
    if isinstance(fields, ChatRequest):
        nothing["tools"] = []
    return fields.model_copy(update=nothing), read_form(fields)


def is_plain(fields: SamplingFields) -> bool:
    """Whether `read_form` has nothing to do that takes time."""
    return fields.response_format is None and fields.structured_outputs is None and not getattr(fields, "tools", ())
