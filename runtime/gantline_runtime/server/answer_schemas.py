"""What good answers look like, for the OpenAPI document alone: answers are written as plain dicts and never pass through these models. That
they tell the truth is held by a test, which compares the answers to generated requests with them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "CachedPrefixes",
    "ChatCompletion",
    "Completion",
    "Detokenized",
    "Embeddings",
    "Encoded",
    "Generated",
    "ModelCard",
    "ModelList",
    "Perplexity",
    "ResponseObject",
    "ServerState",
    "Tokenized",
    "Version",
]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CachedTokens(_Answer):
    cached_tokens: int


class PromptUsage(_Answer):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ReasoningTokens(_Answer):
    reasoning_tokens: int


class Usage(PromptUsage):
    completion_tokens: int
    completion_tokens_details: ReasoningTokens


class FunctionCall(_Answer):
    name: str
    arguments: str


class ToolCall(_Answer):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(_Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class TokenLogprob(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Answer):
    content: list[ChosenToken]
    refusal: None


class ChatChoice(_Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    token_ids: list[int] = []


class RankedToken(_Answer):
    logprob: float
    rank: int
    decoded_token: str


class ChatCompletion(_Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    prompt_logprobs: list[dict[str, RankedToken] | None] = []
    usage: Usage


class TextLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(_Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] = []
    prompt_logprobs: list[dict[str, RankedToken] | None] = []


class Completion(_Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ResponseUsage(_Answer):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(BaseModel):
    """A response; its settings are repeated beside these members."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    model: str
    output: list[dict[str, Any]] = Field(description="Items of type message, reasoning or function_call.")
    usage: ResponseUsage
    store: Literal[False]


class EmbeddingItem(_Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(_Answer):
    object: Literal["list"]
    model: str
    data: list[EmbeddingItem]
    usage: PromptUsage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Answer):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(_Answer):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(_Answer):
    prompt: str


class FinishReason(_Answer):
    type: Literal["stop", "length"]


class MetaInfo(_Answer):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    finish_reason: FinishReason
    output_token_logprobs: list[tuple[float, int]] | None


class Generated(_Answer):
    text: str
    output_ids: list[int]
    meta_info: MetaInfo


class Encoded(_Answer):
    input_ids: list[int] | list[list[int]]
    length: int | list[int]


class Perplexity(_Answer):
    ppl: float | None
    perplexity: float | None
    num_tokens: int


class CachedPrefixes(_Answer):
    scheme: int
    cursor: str
    whole: bool
    added: list[int]
    removed: list[int]


class ServerState(BaseModel):
    state: Literal["loading", "warming", "ready", "draining", "dead"]


class Version(_Answer):
    version: str
