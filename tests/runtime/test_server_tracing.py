"""Traces, as a collector receives them over HTTP."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gantline_runtime.config import ServerConfig
from gantline_runtime.errors import ConfigurationError

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import running, wait_until

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Keeps the bodies that are sent to /v1/traces."""

    def __init__(self) -> None:
        bodies = self.bodies = list[bytes]()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def spans(self) -> list[Any]:
        requests = [trace_service.ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [span for r in requests for resource in r.resource_spans for scope in resource.scope_spans for span in scope.spans]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def _attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_a_request_is_a_span_in_the_clients_trace_with_its_phases_and_without_its_words(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    model = write_model(tmp_path / "m", step_seconds=0.01)
    with running(model, "--drain-delay=0", f"--otlp-endpoint={collector.url}") as server:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "Authorization": "Bearer sesame-key"}
        body = {"prompt": "open sesame", "max_tokens": 7, "n": 2, "ignore_eos": True}
        request_id = server.post("/v1/completions", body, headers=headers).headers["x-request-id"]
        server.post("/v1/completions", {"prompt": "sesame", "stream": True, "max_tokens": 3})
        server.get("/health")
        wait_until(lambda: len(collector.spans) >= 11, 10, "the spans arrive")
    spans = collector.spans
    first = next(span for span in spans if span.trace_id.hex() == TRACE and span.parent_span_id.hex() == PARENT)
    found = _attributes(first)
    assert first.name == "POST /v1/completions" and found["gantline.request_id"] == request_id
    assert (found["gen_ai.operation.name"], found["gen_ai.request.model"], found["http.response.status_code"]) == (
        "text_completion",
        "m",
        200,
    )
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (12, 14)
    children = [span for span in spans if span.parent_span_id == first.span_id]
    assert sorted(span.name for span in children) == ["decode", "decode", "prefill", "prefill", "queue", "queue"]
    assert all(first.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano <= first.end_time_unix_nano for s in children)
    decode = next(span for span in children if span.name == "decode")
    assert decode.end_time_unix_nano - decode.start_time_unix_nano > 40e6, "six more steps of 10 ms"
    roots = [span for span in spans if not span.parent_span_id]
    assert len(roots) == 1 and len(spans) == 11, "the stream's own trace, and none of a probe"
    assert not any(b"sesame" in body for body in collector.bodies)


def test_a_collector_that_is_gone_costs_the_server_nothing_but_log_lines(tmp_path: Path) -> None:
    with running(write_model(tmp_path / "m"), "--drain-delay=0", "--otlp-endpoint=http://127.0.0.1:9") as server:
        assert server.post("/v1/completions", {"prompt": "abc"}).json()["choices"][0]["text"] == "abc"
    assert server.wait_exit() == 0


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://x", ""])
def test_what_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match="otlp_endpoint"):
        ServerConfig(otlp_endpoint=endpoint)
