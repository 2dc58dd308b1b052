"""Bodies of the endpoints beside chat and text completions: embeddings, and those that LMDeploy's clients know."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gantline_runtime.messages import Pooling
from gantline_runtime.server.callers import BEST_PRIORITY
from gantline_runtime.server.parameters import UNSUPPORTED_EMBEDDING, UNSUPPORTED_EXTRAS, UNSUPPORTED_GENERATE, drop_harmless
from gantline_runtime.server.protocol import MAX_TIMEOUT_S, MAX_TOKENS, Body, Inputs, SamplingFields, Tokens, invalid

__all__ = ["EmbeddingRequest", "EncodeRequest", "GenerateRequest", "PerplexityRequest"]

_MAX_TEXTS = 256


class _ReadingFields(Body):
    """What requests share that generate nothing."""

    model: str | None = Field(None, max_length=512)
    timeout: float | None = Field(None, gt=0.0, le=MAX_TIMEOUT_S)
    priority: int = Field(0, ge=BEST_PRIORITY, le=-BEST_PRIORITY)

    @property
    def sampling(self) -> SamplingFields:
        """The same of a request that generates."""
        return SamplingFields.model_validate({"timeout": self.timeout, "priority": self.priority})


class EmbeddingRequest(_ReadingFields):
    """OpenAI's, and how to pool: left out, the checkpoint decides (`pooling.py`)."""

    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Pooling | None = None
    normalize: bool = True
    add_special_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        return drop_harmless(body, UNSUPPORTED_EMBEDDING)


class GenerateRequest(SamplingFields):
    """LMDeploy's `/generate`: a text or tokens, without a chat template."""

    prompt: str | None = Field(None, min_length=1)
    input_ids: Tokens | None = None
    max_tokens: int = Field(128, ge=1, le=MAX_TOKENS)
    return_logprob: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        table = {name: neutral for name, neutral in UNSUPPORTED_EXTRAS.items() if name != "input_ids"}
        return drop_harmless(body, table | UNSUPPORTED_GENERATE)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.input_ids is None):
            raise invalid("Give either prompt or input_ids.", "prompt")
        return self


class EncodeRequest(Body):
    """LMDeploy's `/v1/encode`. `do_preprocess` puts the text into a user's message of the chat template."""

    model: str | None = Field(None, max_length=512)
    input: str | Annotated[list[str], Field(min_length=1, max_length=_MAX_TEXTS)]
    do_preprocess: bool = False
    add_bos: bool = True


class PerplexityRequest(_ReadingFields):
    """LMDeploy's `/get_ppl`."""

    input: str | Tokens
