"""From a request's fields to the engine's sampling parameters. Ranges were checked by `protocol.py`, except those that need the model."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gantline_runtime.generation_defaults import GenerationDefaults
from gantline_runtime.messages import SamplingParams
from gantline_runtime.server.errors import ApiError
from gantline_runtime.server.protocol import SamplingFields
from gantline_runtime.tokenizer import Tokenizer

__all__ = ["build_sampling", "num_new_tokens", "require_token", "seeded", "spell_bad_words"]

_SMALLEST_TOP_P = 1e-6
"""top_p 0 means the likeliest token alone, as this does."""


def build_sampling(
    request: SamplingFields, defaults: GenerationDefaults, *, max_new_tokens: int, num_logprobs: int | None, vocab_size: int
) -> SamplingParams:
    """Raises ApiError for token numbers outside of the vocabulary."""

    def default(name: str) -> float:
        value = getattr(request, name)
        return float(getattr(defaults, name) if value is None else value)

    for token in request.stop_token_ids:
        require_token(token, vocab_size, "stop_token_ids")
    if request.min_tokens > max_new_tokens:
        raise ApiError(
            400,
            f"min_tokens is {request.min_tokens}, more than the {max_new_tokens} that may be generated.",
            code="invalid_value",
            param="min_tokens",
        )
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=default("temperature"),
        top_p=max(_SMALLEST_TOP_P, default("top_p")),
        top_k=max(0, int(default("top_k"))),
        min_p=default("min_p"),
        repetition_penalty=default("repetition_penalty"),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias={_parse_token(token, vocab_size): bias for token, bias in request.logit_bias.items()},
        min_new_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        stop_token_ids=tuple(request.stop_token_ids),
        seed=request.seed,
        num_logprobs=num_logprobs,
    )


def num_new_tokens(requested: int | None, prompt_len: int, session_len: int, *, default: int | None, param: str) -> int:
    """How many tokens may be generated; with neither a wish nor a default, what the context leaves. 0
    reads the prompt only. Raises ApiError if it is too little."""
    room = session_len - prompt_len
    if requested == 0 and room >= 0:
        return 0
    wanted = requested if requested is not None else min(room, default or room)
    if room < 1:
        share = "" if requested == 0 else ", one of them to generate"
        message = f"The prompt has {prompt_len} tokens; the model's context holds {session_len}{share}. Shorten it."
        raise ApiError(400, message, code="context_length_exceeded", param=param)
    if wanted > room:
        message = (
            f"The model's context holds {session_len} tokens. The prompt has {prompt_len} and {wanted} are to be generated, "
            f"{prompt_len + wanted} together. Shorten the prompt, or generate at most {room}."
        )
        raise ApiError(400, message, code="context_length_exceeded", param=param)
    return wanted


def seeded(sampling: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of one of several choices: each has a seed of its own, or they would all be the same."""
    if sampling.seed is None or choice == 0:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + choice + (1 << 63)) % (1 << 64) - (1 << 63))


def spell_bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, as it is spelled at a text's beginning and after a space."""
    spelled = (tokenizer.encode(text, add_special_tokens=False) for word in words for text in (word, f" {word.lstrip()}"))
    return tuple(dict.fromkeys(tuple(ids) for ids in spelled if ids))


def _parse_token(text: str, vocab_size: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise ApiError(400, f"logit_bias: {text[:40]!r} is not a token number.", code="invalid_value", param="logit_bias")
    return require_token(int(text), vocab_size, "logit_bias")


def require_token(token: int, vocab_size: int, param: str) -> int:
    if token >= vocab_size:
        raise ApiError(400, f"{param}: token {token} is outside of the vocabulary of {vocab_size}.", code="invalid_value", param=param)
    return token
