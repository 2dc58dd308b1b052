"""OpenAI's parameters that this server does not support, by endpoint. Each is refused by name, unless its value asks for nothing.

A parameter is in one of three places: a field of `protocol.py` (it works), `HARMLESS` (it cannot change the answer and is accepted), or
`UNSUPPORTED` (name -> the values that ask for nothing). Any other name is unknown, and refused too: nothing is silently dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticCustomError

__all__ = ["HARMLESS", "UNSUPPORTED_CHAT", "UNSUPPORTED_COMPLETION", "UNSUPPORTED_MESSAGE", "drop_harmless", "unsupported"]

HARMLESS = ("metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "user")
"""Bookkeeping of OpenAI's platform."""

_TEXT_ONLY = ({"type": "text"},)

UNSUPPORTED_CHAT: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": _TEXT_ONLY,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Null asks for nothing, always."""

UNSUPPORTED_COMPLETION: Mapping[str, tuple[Any, ...]] = {"best_of": (1,), "suffix": ("",)}

UNSUPPORTED_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
"""Members of a message. Clients send answers back as they got them, with these as null or empty."""


def unsupported(param: str, advice: str = "Leave it out.") -> PydanticCustomError:
    context = {"param": param, "advice": advice}
    return PydanticCustomError("unsupported_parameter", "The parameter {param} is not supported. {advice}", context)


def drop_harmless(body: Any, table: Mapping[str, tuple[Any, ...]], harmless: Sequence[str] = HARMLESS) -> Any:
    """`body` without harmless members and without those of `table` that ask for nothing. Raises for one that asks for something."""
    if not isinstance(body, dict):
        return body
    kept = {}
    for name, value in body.items():
        if name in table:
            if value is not None and not any(value == neutral and type(value) is type(neutral) for neutral in table[name]):
                raise unsupported(name)
        elif name not in harmless:
            kept[name] = value
    return kept
