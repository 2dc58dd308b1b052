"""Bodies that clients send: OpenAI's fields, and the extras that vLLM's and LMDeploy's clients know. All are bounded and strictly typed.

Numbers are numbers (never strings, booleans, NaN), unknown names are refused, and what the server does not support is refused by name
(`parameters.py`). A field that is null counts as left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from gantline_runtime.server.callers import BEST_PRIORITY
from gantline_runtime.server.parameters import (
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
    UNSUPPORTED_EXTRAS,
    UNSUPPORTED_MESSAGE,
    UNSUPPORTED_TOKENIZE,
    drop_harmless,
    unsupported,
    unsupported_value,
)
from gantline_runtime.server.protocol_formats import (
    MAX_TOOL_CALLS,
    MAX_TOOLS,
    ReasoningEffort,
    ResponseFormat,
    StructuredOutputs,
    Tool,
    ToolCall,
    ToolChoice,
)

__all__ = [
    "Body",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "Inputs",
    "Message",
    "Prompts",
    "SamplingFields",
    "StreamOptions",
    "TokenId",
    "TokenizeRequest",
    "Tokens",
    "UsageEvents",
]

MAX_MESSAGES = 4096
MAX_PARTS = 16_384
"""Of the contents of all messages together."""
MAX_PROMPTS = 256
MAX_INPUTS = 2048
"""OpenAI's bound for embeddings; libraries on top of its client send a thousand at once."""
MAX_CHOICES = 128
MAX_STOPS = 64
MAX_STOP_CHARS = 8192
MAX_STOP_IDS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_BIASES = 4096
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 1 << 24
MAX_TIMEOUT_S = 86_400
_INT64 = 1 << 63


def invalid(message: str, name: str) -> PydanticCustomError:
    """`name`: the member at fault of what is being validated."""
    return PydanticCustomError("invalid_value", "{message}", {"message": message, "param": name})


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, str_max_length=1 << 30)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


_STRUCTURED_NAMES = {
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
    "json_schema": "json", "regex": "regex", "ebnf": "grammar",
}  # fmt: skip
"""Members of `structured_outputs` by the names that vLLM's clients gave them before it, and that SGLang's do."""

UsageEvents = Literal["none", "last", "all"]


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False

    @model_validator(mode="after")
    def _no_obfuscation(self) -> Self:
        if self.include_obfuscation:
            raise unsupported("include_obfuscation")
        if self.continuous_usage_stats and not self.include_usage:
            message = "stream_options.continuous_usage_stats is only allowed together with include_usage: true."
            raise invalid(message, "continuous_usage_stats")
        return self


class SamplingFields(Body):
    """What both endpoints share. Left out: the checkpoint's generation_config.json decides, then OpenAI's default."""

    model: str | None = Field(None, max_length=512)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    top_k: int | None = Field(None, ge=-1, le=1 << 20)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field({}, max_length=MAX_BIASES)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: Annotated[list[_Stop], BeforeValidator(_as_list, json_schema_input_type=_Stop | list[_Stop]), Field(max_length=MAX_STOPS)] = []
    stop_token_ids: list[TokenId] = Field([], max_length=MAX_STOP_IDS)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=MAX_TOKENS)
    min_new_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    bad_words: list[_BadWord] = Field([], max_length=MAX_BAD_WORDS)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    timeout: float | None = Field(None, gt=0.0, le=MAX_TIMEOUT_S)
    priority: int = Field(0, ge=BEST_PRIORITY, le=-BEST_PRIORITY)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _structured_by_other_names(cls, body: Any) -> Any:
        given = {name: body[name] for name in _STRUCTURED_NAMES if body.get(name) is not None} if isinstance(body, dict) else {}
        if not given:
            return body
        (name, value), *others = given.items()
        if others or body.get("structured_outputs") is not None:
            raise invalid(f"{name} is structured_outputs.{_STRUCTURED_NAMES[name]}; give one of its kind.", name)
        kept = {member: value for member, value in body.items() if member not in _STRUCTURED_NAMES}
        return {**kept, "structured_outputs": {_STRUCTURED_NAMES[name]: value}}

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed together with stream: true.", "stream_options")
        return self

    @model_validator(mode="after")
    def _one_least_number_of_tokens(self) -> Self:
        if self.min_new_tokens is not None:
            if self.min_tokens not in (0, self.min_new_tokens):
                raise invalid("min_tokens and min_new_tokens mean the same here and differ; give one.", "min_new_tokens")
            self.min_tokens = self.min_new_tokens
        return self

    @property
    def usage_events(self) -> UsageEvents:
        """Which of a stream's events have a usage."""
        if self.stream_options is None or not self.stream_options.include_usage:
            return "none"
        return "all" if self.stream_options.continuous_usage_stats else "last"


class _TextPart(Body):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, body: Any) -> Any:
        if isinstance(body, dict) and isinstance(body.get("type"), str) and body["type"] != "text":
            raise unsupported_value(f"Content of type {body['type'][:40]!r}", "This model takes text only.")
        return body


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[_TextPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[_TextPart]), Field(max_length=MAX_MESSAGES)
    ] = []
    name: str | None = Field(None, max_length=256)
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="vLLM's newer name of `reasoning_content`.")
    tool_calls: list[ToolCall] = Field([], max_length=MAX_TOOL_CALLS)
    tool_call_id: str | None = Field(None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        return drop_harmless(body, UNSUPPORTED_MESSAGE, harmless=())

    @model_validator(mode="after")
    def _members_fit_the_role(self) -> Self:
        owners = {"tool_calls": "assistant", "reasoning_content": "assistant", "reasoning": "assistant", "tool_call_id": "tool"}
        for name, role in owners.items():
            if getattr(self, name) and self.role != role:
                raise invalid(f"{name} belongs to messages of the role {role}, not {self.role}.", name)
        return self

    @model_validator(mode="after")
    def _reasoning_has_two_names(self) -> Self:
        if self.reasoning is not None:
            if self.reasoning_content not in (None, self.reasoning):
                raise invalid("reasoning and reasoning_content mean the same here and differ; give one.", "reasoning")
            self.reasoning_content = self.reasoning
        return self

    def for_template(self, *, arguments_as_text: bool = False) -> dict[str, Any]:
        """`developer` is what OpenAI now calls `system`; templates know the older name. Parts of a content are joined by line ends.

        The arguments of calls are the objects that they spell, as most templates want them, or that text. Raises ValueError where they
        spell none.
        """
        role = "system" if self.role == "developer" else self.role
        body: dict[str, Any] = {"role": role, "content": "\n".join(part.text for part in self.content)}
        for name in ("name", "reasoning_content", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        if self.tool_calls:
            body["tool_calls"] = [call.for_template(arguments_as_text=arguments_as_text) for call in self.tool_calls]
        return body


def check_parts(messages: Sequence[Any], name: str) -> None:
    """Raises for contents (of `messages`, which is the member `name`) that have more parts than is allowed."""
    if sum(len(message.content or ()) for message in messages) > MAX_PARTS:
        raise invalid(f"{name} have more than {MAX_PARTS} parts of content in all.", name)


def _without_prompt_logprobs(table: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """`table` for the two endpoints that have `prompt_logprobs`."""
    return {name: neutral for name, neutral in table.items() if name != "prompt_logprobs"}


class ChatRequest(SamplingFields):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: dict[Annotated[str, Field(max_length=128)], Any] = Field({}, max_length=64)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: ReasoningEffort | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        return drop_harmless(body, UNSUPPORTED_CHAT | _without_prompt_logprobs(UNSUPPORTED_EXTRAS))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_parts(self.messages, "messages")
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs is only allowed together with logprobs: true.", "top_logprobs")
        if self.prompt_logprobs is not None and self.stream:
            raise invalid("prompt_logprobs is for whole answers; leave out stream.", "prompt_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise invalid("max_tokens and max_completion_tokens mean the same here and differ; give one.", "max_tokens")
        return self


def _as_prompts(value: Any) -> Any:
    """OpenAI's four forms of a prompt (text, texts, tokens, lists of tokens) as a list of texts or of lists of tokens."""
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int) and not isinstance(value[0], bool)):
        return [value]
    return value


def _form_of(prompts: Any) -> str:
    """By the first prompt, so that an error is told of the form that was meant."""
    return "[tokens]" if isinstance(prompts, list) and prompts and isinstance(prompts[0], list) else "[texts]"


Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
_Prompts = Annotated[
    Annotated[list[str], Tag("[texts]")] | Annotated[list[Tokens], Tag("[tokens]")],
    Discriminator(_form_of),
    BeforeValidator(_as_prompts, json_schema_input_type=str | list[str] | Tokens | list[Tokens]),
]
Prompts = Annotated[_Prompts, Field(min_length=1, max_length=MAX_PROMPTS)]
Inputs = Annotated[_Prompts, Field(min_length=1, max_length=MAX_INPUTS)]


class CompletionRequest(SamplingFields):
    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        return drop_harmless(body, UNSUPPORTED_COMPLETION | _without_prompt_logprobs(UNSUPPORTED_EXTRAS))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise invalid("max_tokens may be 0 only together with echo: true or prompt_logprobs.", "max_tokens")
        if self.prompt_logprobs is not None and (self.stream or (self.echo and self.logprobs is not None)):
            raise invalid(
                "prompt_logprobs is for whole answers; streams, and echo, have those of the prompt by logprobs.", "prompt_logprobs"
            )
        if len(self.prompt) * self.n > MAX_CHOICES * 2:
            raise invalid(f"prompts times n is {len(self.prompt) * self.n}; at most {MAX_CHOICES * 2} are answered at once.", "n")
        return self


class TokenizeRequest(Body):
    """A text, or messages that go through the chat template first."""

    model: str | None = Field(None, max_length=512)
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = True
    chat_template_kwargs: dict[Annotated[str, Field(max_length=128)], Any] = Field({}, max_length=64)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        return drop_harmless(body, UNSUPPORTED_TOKENIZE)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("Give either prompt or messages.", "prompt")
        check_parts(self.messages or (), "messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = Field(None, max_length=512)
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS)
