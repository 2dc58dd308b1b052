"""Every endpoint, declared once: the router, the OpenAPI document and the tests read this table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from gantline_runtime.server import answer_schemas as answers
from gantline_runtime.server import chat, completions, documents, generate, prefixes, prompts, responses, system, text
from gantline_runtime.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gantline_runtime.server.protocol_prompts import EmbeddingRequest, EncodeRequest, GenerateRequest, PerplexityRequest
from gantline_runtime.server.protocol_responses import ResponsesRequest

__all__ = ["ROUTES", "Endpoint"]


@dataclass(frozen=True)
class Endpoint:
    """`path` as Starlette writes it. `body` is the model of a JSON body, `answer` that of a good answer, a stream of events instead
    if `streams` and the body asks for one."""

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    streams: bool = False
    media_type: str = "application/json"
    query: Mapping[str, str] = field(default_factory=dict)
    """Parameters of the query, each a text that may be left out, with what it means."""

    @property
    def name(self) -> str:
        """The path without Starlette's converters, as documents write it."""
        return self.path.replace(":path", "")


ROUTES = (
    Endpoint("POST", "/v1/chat/completions", chat.create_chat_completion, "Answer messages", ChatRequest, answers.ChatCompletion, True),
    Endpoint("POST", "/v1/completions", completions.create_completion, "Continue texts", CompletionRequest, answers.Completion, True),
    Endpoint("POST", "/v1/responses", responses.create_response, "Answer items", ResponsesRequest, answers.ResponseObject, True),
    Endpoint("POST", "/v1/embeddings", prompts.create_embeddings, "Turn texts into vectors", EmbeddingRequest, answers.Embeddings),
    Endpoint("GET", "/v1/models", system.list_models, "The model that is served", answer=answers.ModelList),
    Endpoint("GET", "/v1/models/{model:path}", system.show_model, "One model by its name", answer=answers.ModelCard),
    Endpoint("POST", "/tokenize", text.tokenize, "Turn a text or messages into tokens", TokenizeRequest, answers.Tokenized),
    Endpoint("POST", "/detokenize", text.detokenize, "Turn tokens into a text", DetokenizeRequest, answers.Detokenized),
    Endpoint("POST", "/generate", generate.generate, "Continue a text, as LMDeploy does", GenerateRequest, answers.Generated, True),
    Endpoint("POST", "/v1/encode", prompts.encode, "Turn texts into tokens, as LMDeploy does", EncodeRequest, answers.Encoded),
    Endpoint("POST", "/get_ppl", prompts.compute_perplexity, "The perplexity of a text", PerplexityRequest, answers.Perplexity),
    Endpoint(
        "GET",
        "/internal/prefixes",
        prefixes.list_prefixes,
        "What the cache holds, for gateways",
        answer=answers.CachedPrefixes,
        query={"since": "The cursor of an earlier answer: only what changed since is told."},
    ),
    Endpoint("GET", "/health", system.health, "Liveness", answer=answers.ServerState),
    Endpoint("GET", "/ready", system.ready, "Readiness", answer=answers.ServerState),
    Endpoint("GET", "/metrics", system.metrics, "Prometheus' text format", media_type="text/plain"),
    Endpoint("GET", "/version", system.version, "The server's version", answer=answers.Version),
    Endpoint("GET", "/openapi.json", documents.show_openapi, "This API as an OpenAPI document"),
    Endpoint("GET", "/docs", documents.show_docs, "This API as a page to read", media_type="text/html"),
)
