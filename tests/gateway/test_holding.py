"""Requests for a service without a replica wait for one, within bounds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.gateway_process import GatewayProcess, gateway, write_services
from tests.runtime.server_process import ServerProcess, events, read_metric, wait_until

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
Ask = Callable[..., "Future[httpx.Response]"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("holding") / "services.json"


@pytest.fixture(scope="module")
def waiting(file: Path) -> Iterator[GatewayProcess]:
    """Comments from the start, five seconds of patience, places for three."""
    with gateway(offer(file), "--hold-silence=0.1", "--hold-timeout=5", "--hold-requests=3", "--body-bytes=20000") as process:
        yield process


@pytest.fixture
def ask(waiting: GatewayProcess) -> Iterator[Ask]:
    """Sends a question from a thread of its own."""
    with ThreadPoolExecutor() as pool:

        def send(model: str, **fields: Any) -> Future[httpx.Response]:
            body = {**CHAT, "model": model, **fields}
            return pool.submit(httpx.post, f"{waiting.url}/v1/chat/completions", json=body, timeout=60)

        yield send


def offer(file: Path, **replicas: list[str]) -> Path:
    """Services that have the given `replicas`, all others none."""
    names = {"woken": "echo", "never": "", "suspended": "", "full": ""}
    services = [
        {"name": name, "servedName": served, "replicas": replicas.get(name, []), "wanted": 0, "startupSeconds": 42}
        | ({"suspended": True} if name == "suspended" else {})
        for name, served in names.items()
    ]
    return write_services(file, *services)


def test_held_requests_are_answered_once_a_replica_is_there(waiting: GatewayProcess, file: Path, echo: ServerProcess, ask: Ask) -> None:
    whole, stream = ask("default/woken"), ask("default/woken", stream=True)
    waiting.wait_demand("default/woken", held=2, running=0)
    demand = waiting.demand("default/woken")
    assert demand["held_since_s"] > 0
    assert demand["last_request_age_s"] == 0
    offer(file, woken=[echo.url])
    assert whole.result().json()["choices"][0]["message"]["content"] == "Hello"
    assert stream.result().headers["content-type"].startswith("text/event-stream")
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events(stream.result().text)) == "Hello"
    waiting.wait_demand("default/woken", held=0, held_since_s=0)
    name = "gantline_gateway_held_seconds_count"
    wait_until(lambda: read_metric(waiting.internal("/metrics").text, name, service="woken") == 2, what="both to be counted")


def test_at_the_bound_a_stream_gets_an_error_event_and_everything_else_a_503_with_the_time_that_a_start_still_takes(ask: Ask) -> None:
    whole, stream = ask("never"), ask("never", stream=True)
    answer = whole.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
    assert 30 <= int(answer.headers["retry-after"]) <= 37  # 42 s less the 5 s that it has waited
    text = stream.result().text
    assert stream.result().status_code == 200
    assert text.startswith(": waiting for a replica of never")
    assert [event["error"]["code"] for event in events(text)] == ["no_replica"]
    assert "[DONE]" not in text


def test_more_than_may_wait_are_refused_at_once(waiting: GatewayProcess, ask: Ask) -> None:
    body = {**CHAT, "model": "full", "stream": True}
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(httpx.stream("POST", f"{waiting.url}/v1/chat/completions", json=body, timeout=60))
        waiting.wait_demand("default/full", held=3)
        refused = ask("full").result()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert 30 <= int(refused.headers["retry-after"]) <= 42
    waiting.wait_demand("default/full", held=0)


def test_bodies_for_which_there_is_no_memory_are_refused(ask: Ask) -> None:
    answer = ask("never", user="x" * 20000).result()
    assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (503, "overloaded", "1")


def test_a_suspended_service_is_refused_at_once(ask: Ask) -> None:
    answer = ask("suspended", stream=True).result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "suspended")
    assert "spec.suspend" in answer.json()["error"]["message"]


def test_a_client_that_stops_waiting_is_held_no_longer(waiting: GatewayProcess) -> None:
    body = {**CHAT, "model": "never", "stream": True}
    with httpx.stream("POST", f"{waiting.url}/v1/chat/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith(": waiting")
        waiting.wait_demand("default/never", held=1)
    waiting.wait_demand("default/never", held=0)
