"""Renders a checkpoint's own chat template: Jinja2 in its sandbox, with the names that Hugging Face templates expect.

A template comes with the checkpoint, so it is not trusted: the sandbox keeps it from Python's internals. Nothing inside a process can bound
the time and memory of a template, though; the server therefore renders in a process of its own (`server/template_process.py`).

What templates rely on, after `transformers`' documentation "Chat templates": `messages`, `add_generation_prompt`, the special tokens by
name (`bos_token`, ...), `tools`, `documents`, filter `tojson` without HTML escapes, `raise_exception(text)`, `strftime_now(format)`,
`{% break %}`, `{% continue %}`, and `{% generation %}` blocks, which only mark the assistant's part for training.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["RESERVED_NAMES", "ChatTemplate", "TemplateError"]

RESERVED_NAMES = frozenset({"messages", "add_generation_prompt", "tools", "documents", "chat_template", "tokenize", "return_tensors"})
"""What a client may not set through `chat_template_kwargs`."""

MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 32 << 20


class TemplateError(ValueError):
    """The template is invalid, refused these messages, or did something the sandbox forbids. The text is fit for a client."""


class ChatTemplate:
    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises TemplateError if `source` does not compile."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"the model's chat template has {len(source)} characters, more than {MAX_TEMPLATE_CHARS}")
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError, ValueError, OverflowError) as error:
            raise TemplateError(f"the model's chat template is invalid: {_describe(error)}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt for `messages` ({"role", "content"}), ready to be encoded without further special tokens. Raises TemplateError."""
        context = {"tools": None, "documents": None, **self._special_tokens, **variables}
        context.update(messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt)
        try:
            pieces, size = [], 0
            for piece in self._template.generate(context):
                size += len(piece)
                if size > MAX_RENDERED_CHARS:
                    raise TemplateError("the model's chat template wrote more text than is allowed")
                pieces.append(piece)
            return "".join(pieces)
        except TemplateError:
            raise
        except MemoryError:
            raise TemplateError("the model's chat template used more memory than is allowed") from None
        except Exception as error:  # a template can raise anything: it is a program that we did not write
            raise TemplateError(f"the model's chat template refused the messages: {_describe(error)}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


class _Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _describe(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = getattr(error, "lineno", None)
    return (f"{text} (line {line})" if line else text)[:500]
