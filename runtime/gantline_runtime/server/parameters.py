"""OpenAI's parameters that this server does not support, by endpoint. Each is refused by name, unless its value asks for nothing.

A parameter is in one of three places: a field of `protocol.py` (it works), `HARMLESS` (it cannot change the answer and is accepted), or
`UNSUPPORTED` (name -> the values that ask for nothing). Any other name is unknown, and refused too: nothing is silently dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticCustomError

__all__ = [
    "HARMLESS",
    "UNSUPPORTED_CHAT",
    "UNSUPPORTED_COMPLETION",
    "UNSUPPORTED_EMBEDDING",
    "UNSUPPORTED_EXTRAS",
    "UNSUPPORTED_GENERATE",
    "UNSUPPORTED_MESSAGE",
    "UNSUPPORTED_RESPONSES",
    "UNSUPPORTED_TOKENIZE",
    "drop_harmless",
    "unsupported",
    "unsupported_value",
]

HARMLESS = ("metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "user")
"""Bookkeeping of OpenAI's platform."""

UNSUPPORTED_CHAT: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "audio": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "return_logprob": (False,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Null asks for nothing, always."""

UNSUPPORTED_COMPLETION: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "best_of": (1,),
    "return_logprob": (False,),
    "suffix": ("",),
}

UNSUPPORTED_EXTRAS: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "cache_salt": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "do_preprocess": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "enable_thinking": (),
    "image_data": (),
    "include_reasoning": (True,),
    "input_ids": (),
    "kv_transfer_params": (),
    "kwargs": ({},),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "media_io_kwargs": ({},),
    "migration_request": (),
    "mm_processor_kwargs": ({},),
    "preserve_cache": (False,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_ngram_size": (0,),
    "repetition_ngram_threshold": (0,),
    "request_id": (),
    "return_routed_experts": (False,),
    "return_tokens_as_token_ids": (False,),
    "session_id": (-1,),
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "with_cache": (False,),
}
"""What vLLM's and LMDeploy's clients know beyond OpenAI's, and this server does not do. Their clients send some with every request."""

UNSUPPORTED_GENERATE: dict[str, tuple[Any, ...]] = {"n": (1,), "stream_options": ()}

UNSUPPORTED_EMBEDDING: dict[str, tuple[Any, ...]] = {"dimensions": (), "truncate_prompt_tokens": ()}

UNSUPPORTED_TOKENIZE: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "chat_template": (),
    "continue_final_message": (False,),
    "return_token_strs": (False,),
    "tools": ([],),
}

UNSUPPORTED_RESPONSES: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "max_tokens": (),
    "max_tool_calls": (),
    "moderation": (),
    "n": (1,),
    "previous_response_id": (),
    "prompt": (),
    "return_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "truncation": ("disabled",),
}

UNSUPPORTED_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}
"""Members of a message. Clients send answers back as they got them, with these as null or empty."""


def unsupported(name: str, advice: str = "Leave it out.") -> PydanticCustomError:
    """Of a member of what is being validated."""
    return PydanticCustomError(
        "unsupported_parameter", "The parameter {param} is not supported. {advice}", {"param": name, "advice": advice}
    )


def unsupported_value(what: str, advice: str) -> PydanticCustomError:
    """Of what is being validated itself, which is legal elsewhere."""
    return PydanticCustomError("unsupported_parameter", "{what} is not supported. {advice}", {"what": what, "advice": advice})


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
