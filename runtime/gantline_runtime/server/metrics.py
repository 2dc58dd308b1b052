"""Everything at `/metrics`, in Prometheus' text format. Names are vLLM's where the meaning is the same, under our prefix.

Counters and histograms of requests are kept here, where their beginning and end are seen; what only the engine knows comes with its
reports, twice a second, and is copied as it is: it counts from the engine's start. docs/server.md lists every name.

Several API processes (`--api-workers`) write their counters to files of one folder ($PROMETHEUS_MULTIPROC_DIR, as prometheus_client calls
it), and whichever of them is asked adds them up; what each knows all of, it tells by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from gantline_runtime.engine_messages import EngineReport
from gantline_runtime.server.lifecycle import State

__all__ = ["MULTIPROCESS_FOLDER", "Metrics"]

MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Must be in the environment before prometheus_client is imported."""

disable_created_metrics()  # one more series for each, which nobody asks for

_FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_BETWEEN_TOKENS_S = (
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
    2.5,
    5.0,
)
_REQUEST_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_QUEUE_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 240.0)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Metrics:
    """One registry a server, so that several can live in one process."""

    def __init__(self, version: str) -> None:
        own = CollectorRegistry()
        self.prompt_tokens = Counter("gantline_prompt_tokens", "Prompt tokens of all requests.", registry=own)
        self.generation_tokens = Counter("gantline_generation_tokens", "Tokens generated.", registry=own)
        self._finished = Counter(
            "gantline_request_success",
            "Choices that ended, by reason: stop, length, abort (the client left or did not read), error.",
            ["finished_reason"],
            registry=own,
        )
        self.time_to_first_token = _histogram(
            own, "time_to_first_token_seconds", "From a request's admission to its first token.", _FIRST_TOKEN_S
        )
        self.inter_token_latency = _histogram(own, "inter_token_latency_seconds", "Between two tokens of one choice.", _BETWEEN_TOKENS_S)
        self._latency = _histogram(own, "e2e_request_latency_seconds", "From a request's admission to its end.", _REQUEST_S)
        self.queue_time = _histogram(
            own, "request_queue_time_seconds", "From a request's arrival at the engine to its first step.", _QUEUE_S
        )
        self._prefill_time = _histogram(
            own, "request_prefill_time_seconds", "From a choice's first step to its first token.", _FIRST_TOKEN_S
        )
        self._decode_time = _histogram(own, "request_decode_time_seconds", "From a choice's first token to its last.", _REQUEST_S)
        self._inference_time = _histogram(
            own, "request_inference_time_seconds", "From a choice's first step to its last token.", _REQUEST_S
        )
        self._prompt_lengths = _histogram(own, "request_prompt_tokens", "Prompt tokens of one choice.", _TOKENS)
        self._answer_lengths = _histogram(own, "request_generation_tokens", "Tokens generated for one choice.", _TOKENS)
        self._http = Counter(
            "gantline_http_requests", "HTTP requests, by route, method and status.", ["route", "method", "status"], registry=own
        )
        self._shared = _SharedCollector(version)
        self.registry = _rendered(own)
        self.registry.register(self._shared)
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(reason)

    def finished(self, reason: str, seconds: float) -> None:
        """A choice ended, `seconds` after its admission."""
        self._finished.labels(reason).inc()
        self._latency.observe(seconds)

    def answered(self, *, prompt_tokens: int, tokens: int, prefill_s: float, decode_s: float) -> None:
        """A choice came to its own end."""
        self._prompt_lengths.observe(prompt_tokens)
        self._answer_lengths.observe(tokens)
        self._prefill_time.observe(prefill_s)
        self._decode_time.observe(decode_s)
        self._inference_time.observe(prefill_s + decode_s)

    def http(self, route: str, method: str, status: int) -> None:
        self._http.labels(route, method, str(status)).inc()

    @property
    def startup_phases(self) -> dict[str, float]:
        """Seconds of each phase of the start so far."""
        return self._shared.startup

    def startup(self, phase: str, seconds: float) -> None:
        self._shared.startup[phase] = seconds

    def engine(self, report: EngineReport) -> None:
        self._shared.report = report

    def render(self, state: State) -> bytes:
        self._shared.state = state
        return generate_latest(self.registry)


def _rendered(own: CollectorRegistry) -> CollectorRegistry:
    """The registry that is shown: this process's own, or the sum over all API processes."""
    folder = os.environ.get(MULTIPROCESS_FOLDER)
    if folder is None:
        return own
    summed = CollectorRegistry()
    MultiProcessCollector(summed, path=folder)
    return summed


def _histogram(registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"gantline_{name}", text, buckets=buckets, registry=registry)


class _SharedCollector(Collector):
    """What every API process knows all of: the engine's last report, the server's state and how it started."""

    def __init__(self, version: str) -> None:
        self.report = EngineReport()
        self.state = State.LOADING
        self.startup: dict[str, float] = {}
        self._version = version
        self._planned_bytes = _planned_bytes()

    def collect(self) -> Iterable[Metric]:
        yield InfoMetricFamily("gantline_build", "Version of the server.", value={"version": self._version})
        states = {state.value: float(state is self.state) for state in State}
        yield _gauge_by("state", "1 for the server's state, 0 for the others.", "state", states)
        yield _gauge_by("startup_seconds", "How long each phase of the start took.", "phase", self.startup)
        yield _gauge("memory_planned_bytes", "Memory of one device that the operator planned with; 0 without one.", self._planned_bytes)
        yield from _of_engine(self.report)


def _of_engine(report: EngineReport) -> Iterable[Metric]:
    if report.about:
        yield InfoMetricFamily("gantline_model", _MODEL, value=report.about)
    yield _gauge("num_requests_running", "Requests that the engine computes now.", report.num_running)
    yield _gauge("num_requests_waiting", "Requests that wait in the engine's queue.", report.num_waiting)
    yield _gauge("waiting_tokens", "Predicted tokens of the requests that wait.", report.num_waiting_tokens)
    yield _gauge("kv_cache_usage_perc", "Share of the KV cache's blocks that requests hold, 0 to 1.", report.cache_usage)
    yield _gauge("kv_cache_blocks", "Blocks of the KV cache.", report.num_cache_blocks)
    yield _gauge("prefix_cache_hit_rate", "Share of prompt tokens that the prefix cache had, since the start.", report.prefix_hit_rate)
    yield _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", report.num_queried_tokens)
    yield _counter("prefix_cache_hits", "Prompt tokens that the prefix cache had.", report.num_cached_tokens)
    yield _counter("shared_prefix_tokens", _SHARED_TOKENS, report.num_shared_tokens)
    yield _counter("num_preemptions", "Requests that gave up their blocks and were computed again.", report.num_preemptions)
    yield _counter("engine_steps", "Steps of the engine.", report.num_steps)
    yield _counter_by("engine_step_seconds", _STEP_PARTS, "part", report.step_times)
    yield _counter_by("triton_kernels", _KERNELS, "source", report.kernels)
    yield _gauge_by("memory_promised_bytes", "Memory of one device that the planner's formula expects.", "part", report.promised_bytes)
    yield _gauge_by("memory_reserved_bytes", "Memory of one device that the engine took.", "part", report.reserved_bytes)


def _planned_bytes() -> float:
    """What the operator wrote into the pod, GANTLINE_PLANNED_BYTES."""
    text = os.environ.get("GANTLINE_PLANNED_BYTES", "")
    return float(text) if text.isdecimal() and len(text) < 20 else 0.0


_MODEL = "The model's class, whose implementation runs it, and why Gantline's does not."
_SHARED_TOKENS = "Context tokens that requests behind one prefix did not read again in each step, since they were read once for all."
_KERNELS = "Triton kernels loaded: `image`, made beforehand; `cache`, compiled by an earlier process; `compiled`, by this one."
_STEP_PARTS = "Where the time of steps goes: of the host, and `device`, while the device has a step to run."


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"gantline_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"gantline_{name}", text, value=value)


def _gauge_by(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"gantline_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _counter_by(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"gantline_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
