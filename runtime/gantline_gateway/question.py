"""What a request asks for, read from its body in one pass, as far as a gateway has to know. Whether it is legal, the replica decides."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec
from gantline_runtime.server.api_error import ApiError

__all__ = ["PREFIX_BYTES", "Question", "parse_question", "rename_model"]

PREFIX_BYTES = 1024
"""Prompts that are equal for so long share a replica: some 256 tokens, below which a shared beginning is not worth a detour."""

_BYTES_PER_TOKEN = 4.0
"""Of English text and most code. Prompts are only estimated here; what they really were is known from the answer's usage."""
_MAX_MODEL_CHARS = 512
_MAX_TOKENS = 1 << 24


class _Body(msgspec.Struct):
    """The fields that matter here; their values may still be of wrong types, which the replica refuses by name."""

    model: Any = None
    stream: Any = None
    n: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    prompt_cache_key: Any = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    input_ids: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()


_decoder = msgspec.json.Decoder(_Body)
_rename_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True)
class Question:
    model: str
    stream: bool
    prompt_tokens: int
    """Estimated."""
    max_tokens: int | None
    """What the client allows for one choice; None where it leaves that to the server."""
    choices: int
    cache_key: str
    """OpenAI's `prompt_cache_key`: the client's own name for what belongs together; empty where there is none."""
    prefix: bytes
    """Identifies the prompt's beginning; empty for a prompt shorter than `PREFIX_BYTES`."""


def parse_question(body: bytes) -> Question:
    """Raises ApiError 400 for what is not a JSON object that names a model."""
    try:
        fields = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not a JSON object: {str(error)[:200]}.", code="invalid_json") from None
    if fields.model is None:
        raise ApiError(400, "model is required: it says which service answers.", code="missing_parameter", param="model")
    if not isinstance(fields.model, str) or not 0 < len(fields.model) <= _MAX_MODEL_CHARS:
        raise ApiError(400, f"model is not a text of 1 to {_MAX_MODEL_CHARS} characters.", code="invalid_value", param="model")
    prompt = bytes(fields.messages or fields.prompt or fields.input or fields.input_ids)
    instructions = bytes(fields.instructions)
    limits = (fields.max_completion_tokens, fields.max_tokens, fields.max_output_tokens)
    return Question(
        model=fields.model,
        stream=fields.stream is True,
        prompt_tokens=_count_tokens(prompt) + _count_tokens(instructions),
        max_tokens=next((limit for limit in map(_whole, limits) if limit is not None), None),
        choices=_whole(fields.n) or 1,
        cache_key=fields.prompt_cache_key if isinstance(fields.prompt_cache_key, str) else "",
        prefix=_identify(instructions, prompt),
    )


def rename_model(body: bytes, model: str) -> bytes:
    """`body`, which was parsed, with another `model`; all other values stay byte for byte as they are."""
    fields = _rename_decoder.decode(body)
    return msgspec.json.encode({**fields, "model": model})


def _count_tokens(prompt: bytes) -> int:
    if prompt.startswith(b"[") and b'"' not in prompt:  # numbers of tokens
        return prompt.count(b",") + 1
    return int(len(prompt) / _BYTES_PER_TOKEN)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_TOKENS else None


def _identify(*parts: bytes) -> bytes:
    beginning = b"".join(part[:PREFIX_BYTES] for part in parts)[:PREFIX_BYTES]
    return blake2b(beginning, digest_size=16).digest() if len(beginning) == PREFIX_BYTES else b""
