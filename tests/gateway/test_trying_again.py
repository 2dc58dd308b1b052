"""What has not begun to stream is tried elsewhere; what has ends with an error that a client can see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.gateway.gateway_process import GatewayProcess, gateway, write_services
from tests.gateway.scripted_replica import ANSWERS, ScriptedReplica, closed_url, scripted
from tests.runtime.server_process import ServerProcess, events, read_metric

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
CAUSES = {"reset": "reset", "draining": "not_ready", "loading": "not_ready", "busy": "busy", "half-answer": "reset", "half-head": "reset"}


@pytest.fixture(scope="module")
def replicas() -> Iterator[dict[str, ScriptedReplica]]:
    with scripted(*ANSWERS) as found:
        yield found


@pytest.fixture(scope="module")
def crowd() -> Iterator[list[ScriptedReplica]]:
    """Replicas that are all busy."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(scripted("busy"))["busy"] for _ in range(5)]


@pytest.fixture(scope="module")
def troubled(
    tmp_path_factory: pytest.TempPathFactory, echo: ServerProcess, replicas: dict[str, ScriptedReplica], crowd: list[ScriptedReplica]
) -> Iterator[GatewayProcess]:
    """For each script a service whose only replica has it, and another that has `echo` beside it."""
    beside = [{"name": f"{name}-and-good", "servedName": "echo", "replicas": [item.url, echo.url]} for name, item in replicas.items()]
    alone = [{"name": name, "replicas": [item.url]} for name, item in replicas.items()]
    full = {"name": "crowd", "replicas": [item.url for item in crowd]}
    gone = {"name": "gone-and-good", "servedName": "echo", "replicas": [closed_url(), echo.url]}
    file = write_services(tmp_path_factory.mktemp("troubled") / "services.json", *beside, *alone, gone, full)
    with gateway(file, "--max-resets=1", "--hold-timeout=0.5", "--hold-silence=60") as process:
        yield process


def ask(process: GatewayProcess, model: str, **fields: Any) -> httpx.Response:
    return process.post("/v1/chat/completions", {**CHAT, "model": f"default/{model}", **fields})


@pytest.mark.parametrize("script", CAUSES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_has_done_nothing_is_made_good_by_another(
    troubled: GatewayProcess, replicas: dict[str, ScriptedReplica], script: str, stream: bool
) -> None:
    name, before = f"{script}-and-good", replicas[script].requests
    for _ in range(50):
        answer = ask(troubled, name, stream=stream)
        assert answer.status_code == 200
        assert "error" not in answer.text
        if replicas[script].requests > before:
            break
    assert replicas[script].requests > before, "the troubled one was never asked"
    page = troubled.internal("/metrics").text
    assert read_metric(page, "gantline_gateway_retries_total", service=name, cause=CAUSES[script]) >= 1


def test_a_replica_that_takes_no_connection_is_made_good_and_then_avoided(troubled: GatewayProcess) -> None:
    for _ in range(30):
        assert ask(troubled, "gone-and-good").status_code == 200
    page = troubled.internal("/metrics").text
    assert 1 <= read_metric(page, "gantline_gateway_retries_total", service="gone-and-good", cause="unreachable") <= 3


def test_a_full_queue_everywhere_is_passed_on_with_its_retry_after(troubled: GatewayProcess) -> None:
    answer = ask(troubled, "busy")
    assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]["code"]) == (429, "7", "queue_full")


def test_where_all_are_busy_not_all_are_asked(troubled: GatewayProcess, crowd: list[ScriptedReplica]) -> None:
    assert ask(troubled, "crowd").status_code == 429
    assert sum(replica.requests for replica in crowd) == 3


def test_a_request_that_breaks_connections_does_not_go_around_all_replicas(
    troubled: GatewayProcess, replicas: dict[str, ScriptedReplica]
) -> None:
    before = replicas["reset"].requests
    answer = ask(troubled, "reset")
    assert (answer.status_code, answer.json()["error"]["code"]) in [(502, "bad_gateway"), (503, "no_replica")]
    assert replicas["reset"].requests - before <= 2


def test_a_replica_that_stays_draining_is_given_up_at_the_bound(troubled: GatewayProcess) -> None:
    answer = ask(troubled, "draining")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
    assert int(answer.headers["retry-after"]) >= 5


def test_a_stream_whose_replica_dies_ends_with_an_error_event(troubled: GatewayProcess) -> None:
    answer = ask(troubled, "half-stream", stream=True)
    assert answer.status_code == 200
    first, last = events(answer.text)
    assert first == {"choices": []}
    assert last["error"]["code"] == "bad_gateway"
    assert "[DONE]" not in answer.text


def test_responses_end_with_an_error_event_of_their_own_type(troubled: GatewayProcess) -> None:
    answer = troubled.post("/v1/responses", {"model": "half-stream", "input": "Hello", "stream": True})
    assert answer.text.splitlines()[-3] == "event: error"
    assert events(answer.text)[-1]["type"] == "error"


def test_what_a_replica_says_is_passed_on_however_odd(troubled: GatewayProcess) -> None:
    answer = ask(troubled, "odd")
    assert (answer.status_code, answer.text, answer.headers["content-type"]) == (500, "oops", "text/plain")
