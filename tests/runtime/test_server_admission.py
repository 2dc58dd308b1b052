"""Deadlines, priorities and a full queue, as clients meet them."""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, running, wait_until


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One request runs, one waits; 50 tokens a second."""
    model = write_model(tmp_path_factory.mktemp("slow") / "m", step_seconds=0.02)
    with running(model, "--drain-delay=0", "--drain-timeout=0", "--max-batch-size=1", "--max-waiting=3") as server:
        yield server


def _body(tokens: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": "ab", "max_tokens": tokens, "ignore_eos": True, **fields}


def _wait_until_idle(server: ServerProcess) -> None:
    wait_until(lambda: server.metric("gantline_num_requests_running") == 0, what="the engine is idle")


def test_an_answer_that_takes_too_long_ends_with_504_and_its_work_with_it(slow: ServerProcess) -> None:
    began = time.monotonic()
    response = slow.post("/v1/completions", _body(4000, timeout=0.5))
    assert response.status_code == 504 and response.json()["error"]["code"] == "deadline_exceeded"
    assert 0.4 < time.monotonic() - began < 3
    _wait_until_idle(slow)
    wait_until(lambda: slow.metric("gantline_kv_cache_usage_perc") == 0, what="its blocks are free")  # a step in flight may hold them


def test_a_stream_that_takes_too_long_keeps_what_it_has_and_ends_with_an_error_event(slow: ServerProcess) -> None:
    _wait_until_idle(slow)
    with slow._client.stream("POST", slow.url + "/v1/completions", json=_body(4000, timeout=1.0, stream=True)) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]).startswith("abab")
    assert events[-1]["error"]["code"] == "deadline_exceeded"


def test_who_waits_longer_than_its_deadline_never_runs(slow: ServerProcess) -> None:
    _wait_until_idle(slow)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow.post, "/v1/completions", _body(100))
        wait_until(lambda: slow.metric("gantline_num_requests_running") == 1, what="the first runs")
        before = slow.metric("gantline_generation_tokens_total")
        assert slow.post("/v1/completions", _body(5, timeout=0.3)).json()["error"]["code"] == "deadline_exceeded"
        assert first.result(30).status_code == 200
    _wait_until_idle(slow)
    assert slow.metric("gantline_generation_tokens_total") - before <= 100


def test_a_deadline_that_is_met_changes_nothing(slow: ServerProcess) -> None:
    assert slow.post("/v1/completions", _body(4, timeout=60)).json()["choices"][0]["text"] == "abab"


@pytest.mark.parametrize(
    ("field", "value"), [("timeout", 0), ("timeout", -1), ("timeout", "5"), ("priority", 11), ("priority", -11), ("priority", 0.5)]
)
def test_a_deadline_or_priority_out_of_range_is_refused(slow: ServerProcess, field: str, value: Any) -> None:
    response = slow.post("/v1/completions", _body(4, **{field: value}))
    assert response.status_code == 400 and response.json()["error"]["param"] == field


def test_a_full_queue_tells_each_client_a_later_time(slow: ServerProcess) -> None:
    _wait_until_idle(slow)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        responses = [f.result(60) for f in [pool.submit(slow.post, "/v1/completions", _body(30)) for _ in range(12)]]
    refused = [response for response in responses if response.status_code == 429]
    assert len(refused) == 8 and {r.json()["error"]["code"] for r in refused} == {"queue_full"}
    assert all(1 <= int(r.headers["retry-after"]) <= 60 for r in refused)
    assert sum(r.status_code == 200 for r in responses) == 4


def test_a_request_of_better_priority_overtakes_those_that_wait(slow: ServerProcess) -> None:
    _wait_until_idle(slow)
    order: list[str] = []

    def ask(name: str, priority: int) -> None:
        with httpx.Client(timeout=60) as client:
            assert client.post(slow.url + "/v1/completions", json=_body(150 if name == "runs" else 4, priority=priority)).status_code == 200
        order.append(name)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        pool.submit(ask, "runs", 0)
        wait_until(lambda: slow.metric("gantline_num_requests_running") == 1, what="the first runs")
        for count, (name, priority) in enumerate([("patient", 5), ("urgent", -5)], 1):
            pool.submit(ask, name, priority)
            wait_until(lambda count=count: slow.metric("gantline_num_requests_waiting") == count, what="it waits")  # type: ignore[misc]
    assert order == ["runs", "urgent", "patient"]


def test_the_servers_own_limit_cuts_what_clients_ask_for(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", step_seconds=0.02)
    with running(model, "--drain-delay=0", "--drain-timeout=0", "--request-timeout=0.5") as server:
        for fields in ({}, {"timeout": 50}):
            assert server.post("/v1/completions", _body(4000, **fields)).json()["error"]["code"] == "deadline_exceeded"


def test_predicted_tokens_that_wait_are_bounded_too(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", step_seconds=0.02)
    flags = ("--drain-delay=0", "--drain-timeout=0", "--max-batch-size=1", "--max-waiting=100", "--max-waiting-tokens=300")
    with running(model, *flags) as server, concurrent.futures.ThreadPoolExecutor(1) as pool, httpx.Client(timeout=60) as client:
        with client.stream("POST", f"{server.url}/v1/completions", json=_body(4000, stream=True)):  # runs until we leave
            wait_until(lambda: server.metric("gantline_num_requests_running") == 1, what="the first runs")
            waits = pool.submit(server.post, "/v1/completions", _body(4, prompt="x" * 200))
            wait_until(lambda: server.metric("gantline_waiting_tokens") > 200, what="the second waits")
            refused = server.post("/v1/completions", _body(4, prompt="x" * 100))
            assert refused.status_code == 429 and "predicted tokens" in refused.json()["error"]["message"]
        assert waits.result(30).status_code == 200
