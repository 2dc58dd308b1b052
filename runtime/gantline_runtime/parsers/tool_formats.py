"""How models write tool calls: one description a format, from which text is parsed and grammars are written.

A *block* is one stretch of text that holds calls: from one of the `begins` to `end`, or to the end of the answer where `end` is empty.

    hermes        <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>: Hermes, Qwen 2.5 and 3; a block a call
    mistral       [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]: Mistral, older ones
    mistral_args  [TOOL_CALLS]f[ARGS]{...}: Mistral, newer ones; each is read as the other, too
    llama3_json   {"name": "f", "parameters": {...}}; ...  perhaps after <|python_tag|>: Llama 3.1 to 3.3
    deepseek_v3   <｜tool▁calls▁begin｜>, calls, <｜tool▁calls▁end｜>; a call is
                  <｜tool▁call▁begin｜>function<｜tool▁sep｜>f\\n```json\\n{...}\\n```<｜tool▁call▁end｜>
    deepseek_v31  the same, a call being <｜tool▁call▁begin｜>f<｜tool▁sep｜>{...}<｜tool▁call▁end｜>

Sources: the models' own chat templates. Calls in the canonical form are what grammars enforce; the parsers take what models
write when nothing holds them, too: other white space, another order of keys, arguments as a string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["TOOL_FORMATS", "Call", "ToolFormat", "choose_tool_format"]


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True)
class ToolFormat:
    begins: tuple[str, ...]
    """Markers of which one begins a block."""
    end: str
    parse: Callable[[str], list[Call] | None]
    """The calls of a whole block, markers included; None if it holds none, or anything else."""
    opening: str
    """Canonical form: `opening`, then calls with `separator` between, then `closing`. A call is `before_name`, its name, `after_name`, its
    arguments, `after_arguments`."""
    before_name: str
    after_name: str
    after_arguments: str
    separator: str
    closing: str
    only_at_start: bool = False
    """Whether a block can only begin where the answer does."""
    arguments_as_text: bool = False
    """Whether the template wants the arguments of earlier calls as JSON text, not as an object."""
    id_length: int = 0
    """Characters of a call's identifier; 0: any number."""
    signs: tuple[str, ...] = ()
    """What in a chat template tells that its model writes this: any of them."""

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers that may be special tokens."""
        parts = (*self.begins, self.end, self.opening, self.before_name, self.after_name, self.after_arguments, self.closing)
        found = {marker for part in parts for marker in _MARKER.findall(part)}
        return tuple(sorted(found))


_MARKER = re.compile(r"<｜[^｜]*｜>|<\|[^|]*\|>|\[[A-Z_]+\]|</?tool_call>")


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_no_constant)


def choose_tool_format(template: str) -> str | None:
    """The name of the format whose signs are in a chat template; None if there is none."""
    return next((name for name, kind in TOOL_FORMATS.items() if any(sign in template for sign in kind.signs)), None)


def _value(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON value at `at` or behind white space there, and where it ends."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    try:
        value, end = _JSON.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None
    return value, end


def _call(value: Any) -> Call | None:
    """From {"name", "arguments" or "parameters"}."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    keys = value.keys() - {"name", "id", "type"}
    if len(keys) > 1 or not keys <= {"arguments", "parameters"}:
        return None
    return _with_arguments(value["name"], value[keys.pop()] if keys else {})


def _with_arguments(name: str, arguments: Any) -> Call | None:
    if isinstance(arguments, str):  # JSON within JSON
        parsed = _value(arguments, 0)
        if parsed is None or arguments[parsed[1] :].strip():
            return None
        arguments = parsed[0]
    if not name or not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    return Call(name, text if text.isascii() or not _has_surrogates(text) else json.dumps(arguments))


def _has_surrogates(text: str) -> bool:
    """Halves of characters, which JSON can spell and UTF-8 cannot."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def _sequence(text: str, separators: str) -> list[Call] | None:
    """Calls as JSON objects, one after the other, and nothing else."""
    calls: list[Call] = []
    at = 0
    while text[at:].strip(separators + " \t\r\n"):
        while text[at] in separators + " \t\r\n":
            at += 1
        parsed = _value(text, at)
        call = _call(parsed[0]) if parsed is not None else None
        if call is None or parsed is None:
            return None
        calls.append(call)
        at = parsed[1]
    return calls or None


def _parse_hermes(block: str) -> list[Call] | None:
    body = block.removeprefix("<tool_call>").removesuffix("</tool_call>")
    calls = _sequence(body, "")
    return calls if calls and len(calls) == 1 else None


def _parse_llama(block: str) -> list[Call] | None:
    return _sequence(block.strip().removeprefix("<|python_tag|>"), ";")


def _parse_mistral(block: str) -> list[Call] | None:
    body = block.strip().removeprefix("[TOOL_CALLS]").strip()
    if body.startswith("["):
        parsed = _value(body, 0)
        if parsed is None or body[parsed[1] :].strip() or not parsed[0]:
            return None
        calls = [_call(value) for value in parsed[0]]
    else:
        calls = [_named_call(part) for part in body.split("[TOOL_CALLS]")]
    return [call for call in calls if call is not None] if all(calls) else None


_NAME = re.compile(r"\s*([^\s{}\[\]\"]{1,256})(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")


def _named_call(text: str) -> Call | None:
    """`name[ARGS]{...}`"""
    name = _NAME.match(text)
    parsed = _value(text, name.end()) if name else None
    if name is None or parsed is None or text[parsed[1] :].strip():
        return None
    return _with_arguments(name[1], parsed[0])


_DEEPSEEK_CALL = re.compile(
    r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>(?P<old>[^\n`]{1,256})\n```json\n(?P<fenced>.*?)\n```"
    r"|(?P<new>[^<\n]{1,256})<｜tool▁sep｜>(?P<plain>.*?))\s*<｜tool▁call▁end｜>",
    re.DOTALL,
)


def _parse_deepseek(block: str) -> list[Call] | None:
    body = block.strip().removeprefix("<｜tool▁calls▁begin｜>").removesuffix("<｜tool▁calls▁end｜>").rstrip()
    calls: list[Call] = []
    at = 0
    while at < len(body):
        found = _DEEPSEEK_CALL.match(body, at)
        if found is None:
            return None
        call = _with_arguments((found["old"] or found["new"]).strip(), found["fenced"] if found["old"] else found["plain"])
        if call is None:
            return None
        calls.append(call)
        at = found.end()
    return calls or None


TOOL_FORMATS = {
    "deepseek_v31": ToolFormat(
        begins=("<｜tool▁calls▁begin｜>",),
        end="<｜tool▁calls▁end｜>",
        parse=_parse_deepseek,
        opening="<｜tool▁calls▁begin｜>",
        before_name="<｜tool▁call▁begin｜>",
        after_name="<｜tool▁sep｜>",
        after_arguments="<｜tool▁call▁end｜>",
        separator="",
        closing="<｜tool▁calls▁end｜>",
        arguments_as_text=True,
        signs=("'<｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>'",),
    ),
    "deepseek_v3": ToolFormat(
        begins=("<｜tool▁calls▁begin｜>",),
        end="<｜tool▁calls▁end｜>",
        parse=_parse_deepseek,
        opening="<｜tool▁calls▁begin｜>",
        before_name="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        after_name="\n```json\n",
        after_arguments="\n```<｜tool▁call▁end｜>",
        separator="\n",
        closing="<｜tool▁calls▁end｜>",
        arguments_as_text=True,
        signs=("<｜tool▁calls▁begin｜>",),
    ),
    "mistral_args": ToolFormat(
        begins=("[TOOL_CALLS]",),
        end="",
        parse=_parse_mistral,
        opening="",
        before_name="[TOOL_CALLS]",
        after_name="[ARGS]",
        after_arguments="",
        separator="",
        closing="",
        id_length=9,
        signs=("[ARGS]",),
    ),
    "mistral": ToolFormat(
        begins=("[TOOL_CALLS]",),
        end="",
        parse=_parse_mistral,
        opening="[TOOL_CALLS][",
        before_name='{"name": "',
        after_name='", "arguments": ',
        after_arguments="}",
        separator=", ",
        closing="]",
        id_length=9,
        signs=("[TOOL_CALLS]",),
    ),
    "hermes": ToolFormat(
        begins=("<tool_call>",),
        end="</tool_call>",
        parse=_parse_hermes,
        opening="",
        before_name='<tool_call>\n{"name": "',
        after_name='", "arguments": ',
        after_arguments="}\n</tool_call>",
        separator="\n",
        closing="",
        signs=("<tool_call>",),
    ),
    "llama3_json": ToolFormat(
        begins=("<|python_tag|>", "{"),
        end="",
        parse=_parse_llama,
        opening="",
        before_name='{"name": "',
        after_name='", "parameters": ',
        after_arguments="}",
        separator="; ",
        closing="",
        only_at_start=True,
        signs=("<|python_tag|>", "<|start_header_id|>ipython<|end_header_id|>"),
    ),
}
"""By the name that `--tool-call-parser` takes; a template is searched for their signs in this order."""
