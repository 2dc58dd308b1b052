"""Traces of requests, sent to an OpenTelemetry collector by OTLP over HTTP. An option: the extra `tracing` has what it needs.

A request becomes a span when it is over, inside of the client's trace if its `traceparent` names one, with a child for each choice's time
in the queue, before its first token, and until its last. Attributes follow OpenTelemetry's conventions for HTTP and generative AI; none
holds a prompt, an answer, or a key. Sampling and batching are set by OpenTelemetry's own environment variables (OTEL_TRACES_SAMPLER, ...).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gantline_runtime.errors import ConfigurationError
from gantline_runtime.server.generation import Choice, Generation

__all__ = ["FinishedRequest", "Tracing"]

_CLOSE_S = 2.0
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/generate": "text_completion",
}


@dataclass(frozen=True)
class FinishedRequest:
    """What the access log knows of a request too. `seconds` is how long it took until now."""

    method: str
    route: str
    status: int
    seconds: float
    request_id: str
    headers: Mapping[str, str]
    model: str = ""
    generation: Generation | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)


class Tracing:
    def __init__(self, endpoint: str, *, version: str) -> None:
        """`endpoint`: the collector, such as http://collector:4318. Raises ConfigurationError if OpenTelemetry is not installed."""
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as error:
            cure = "Install it with: pip install 'gantline[tracing]', or leave out --otlp-endpoint."
            raise ConfigurationError(f"traces need the package {error.name}, which is not installed", cure=cure) from None
        self._trace = trace
        resource = Resource.create({"service.name": "gantline", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")))
        self._tracer = self._provider.get_tracer("gantline", version)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, request: FinishedRequest) -> None:
        """Make the spans of a request that has just ended; they are sent later, by a thread."""
        end_ns = time.time_ns()
        span = self._tracer.start_span(
            f"{request.method} {request.route}",
            context=self._propagator.extract({"traceparent": request.headers.get("traceparent", "")}),
            kind=self._trace.SpanKind.SERVER,
            start_time=end_ns - int(1e9 * request.seconds),
            attributes=_attributes(request),
        )
        if span.is_recording():
            if request.status >= 500:
                span.set_status(self._trace.StatusCode.ERROR)
            inside = self._trace.set_span_in_context(span)
            offset_ns = end_ns - int(1e9 * time.monotonic())
            for choice in request.generation.choices if request.generation is not None else ():
                self._record_choice(choice, inside, offset_ns)
        span.end(end_ns)

    def _record_choice(self, choice: Choice, inside: Any, offset_ns: int) -> None:
        """`offset_ns` turns the monotonic clock's time into the wall's."""
        if choice.last_token_at is None:
            return
        started = choice.submitted_at + choice.queue_s
        for name, begin, end in (
            ("queue", choice.submitted_at, started),
            ("prefill", started, choice.first_token_at),
            ("decode", choice.first_token_at, choice.last_token_at),
        ):
            attributes = {"gantline.choice": choice.index}
            span = self._tracer.start_span(name, context=inside, start_time=offset_ns + int(1e9 * begin), attributes=attributes)
            span.end(offset_ns + int(1e9 * max(begin, end)))

    async def close(self) -> None:
        """Send what is left, but not for long: a collector that is gone must not hold up the server's end."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def shutdown() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=shutdown, daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await sent.wait()


def _attributes(request: FinishedRequest) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "http.request.method": request.method,
        "http.route": request.route,
        "http.response.status_code": request.status,
        "gantline.request_id": request.request_id,
    }
    if request.route in _OPERATIONS:
        attributes |= {"gen_ai.operation.name": _OPERATIONS[request.route], "gen_ai.provider.name": "gantline"}
    if request.generation is not None:
        attributes |= {
            "gen_ai.request.model": request.model,
            "gen_ai.usage.input_tokens": request.usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": request.usage["completion_tokens"],
            "gen_ai.response.finish_reasons": request.generation.finish_reasons,
        }
    return attributes
