"""What a client gets through the gateway is what the replica says."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from typing import Any

import httpx
import pytest
from gantline_gateway.app import FORWARDED
from gantline_runtime.server.routes import ROUTES

from tests.gateway.gateway_process import GatewayProcess
from tests.runtime.server_process import ServerProcess, read_metric, wait_until

CHAT: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "Hello there"}]}
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"model": "echo", "prompt": "abc", "n": 2, "stream": True}),
    ("/v1/responses", {"model": "echo", "input": "abc", "stream": True}),
    ("/v1/responses", {"model": "echo", "input": "abc"}),
    ("/v1/embeddings", {"model": "echo", "input": ["abc", "d"]}),
    ("/tokenize", {"model": "echo", "prompt": "abc"}),
    ("/detokenize", {"model": "echo", "tokens": [1, 2]}),
    ("/generate", {"model": "echo", "prompt": "abc", "stream": True}),
    ("/v1/encode", {"model": "echo", "input": "abc"}),
    ("/get_ppl", {"model": "echo", "input": "abc"}),
    ("/v1/chat/completions", {**CHAT, "temperature": 99}),
    ("/v1/chat/completions", {**CHAT, "stream": "yes"}),
    ("/v1/chat/completions", {"model": "echo", "messages": 3}),
    ("/v1/embeddings", {"model": "echo"}),
]


@pytest.mark.parametrize(("path", "body"), QUESTIONS, ids=[f"{path} {sorted(body)}" for path, body in QUESTIONS])
def test_an_answer_through_the_gateway_is_the_replicas_own(
    shared: GatewayProcess, echo: ServerProcess, path: str, body: dict[str, Any]
) -> None:
    direct, through = echo.post(path, body), shared.post(path, body)
    assert through.status_code == direct.status_code
    assert _gist(through.text) == _gist(direct.text)
    assert through.headers["content-type"] == direct.headers["content-type"]


def _gist(text: str) -> Any:
    """Of a stream what it says all in all, since tokens share events as they come; of another answer all of it."""
    if not text.startswith(("data: ", "event: ")):
        return _without_names(text)
    said = sorted("".join(re.findall(r'"(?:content|text|delta)":"([^"]*)"', text)))
    ends = re.findall(r'"(?:finish_reason|type)":"(stop|response.completed)"', text)
    last = [line for line in text.splitlines() if "_tokens" in line][-1:]
    return said, ends, re.findall(r'"\w+_tokens":\d+', "".join(last)), "[DONE]" in text


def _without_names(text: str) -> str:
    """Without what differs from answer to answer."""
    text = re.sub(r'"(?:id|item_id|request_id)":\s*"[^"]*"', '"id":""', text)
    return re.sub(r'"(created|created_at|completed_at)":\s*\d+', r'"\1":0', text)


def test_every_endpoint_of_the_runtime_that_names_a_model_is_offered() -> None:
    assert {route.path for route in ROUTES if route.method == "POST"} == FORWARDED


def test_an_openai_client_streams_through_it(shared: GatewayProcess) -> None:
    stream = shared.client().chat.completions.create(**CHAT, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == "Hello there"
    assert shared.client().models.retrieve("echo").id == "echo"


def test_a_service_answers_to_its_full_name_and_to_its_served_name(shared: GatewayProcess) -> None:
    assert shared.post("/v1/chat/completions", {**CHAT, "model": "default/echo"}).json()["model"] == "echo"


def test_a_request_id_goes_all_the_way_and_comes_back(shared: GatewayProcess, echo: ServerProcess) -> None:
    answer = shared.post("/v1/chat/completions", CHAT, headers={"X-Request-Id": "request-7"})
    assert answer.headers.get_list("x-request-id") == ["request-7"]
    wait_until(lambda: any(line.get("request_id") == "request-7" for line in echo.logs), what="the replica's log line")


def test_what_is_no_request_is_refused_in_the_one_shape(shared: GatewayProcess) -> None:
    chat = "/v1/chat/completions"
    cases: list[tuple[int, str, httpx.Response]] = [
        (400, "invalid_json", shared.send("POST", chat, content=b"{", headers={"Content-Type": "application/json"})),
        (400, "missing_parameter", shared.post(chat, {"messages": []})),
        (400, "invalid_value", shared.post(chat, {"model": 3})),
        (404, "model_not_found", shared.post(chat, {**CHAT, "model": "nobody"})),
        (404, "not_found", shared.get("/v1/nothing")),
        (405, "method_not_allowed", shared.get(chat)),
        (413, "body_too_large", shared.post(chat, {**CHAT, "user": "x" * (9 << 20)})),
        (415, "unsupported_media_type", shared.send("POST", chat, content=b"{}", headers={"Content-Type": "text/plain"})),
    ]
    for status, code, answer in cases:
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "'echo'" in cases[3][2].json()["error"]["message"]
    page = shared.internal("/metrics").text
    assert all(read_metric(page, "gantline_gateway_unserved_total", code=code) >= 1 for _, code, _ in cases)


def test_a_request_whose_head_never_ends_is_given_up(shared: GatewayProcess) -> None:
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\n")
        said = b""
        with contextlib.suppress(OSError):  # it may be closed while we still write
            for _ in range(64):
                connection.sendall(b"X-Long: " + b"x" * 16384 + b"\r\n")
            said = connection.recv(1000)
    assert said.startswith(b"HTTP/1.1 400 ") or not said


def test_a_name_that_two_services_have_is_refused_and_the_choices_are_named(shared: GatewayProcess) -> None:
    answer = shared.post("/v1/chat/completions", {**CHAT, "model": "echo-twice"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "ambiguous_model")
    assert "'a/twice', 'b/twice'" in answer.json()["error"]["message"]


def test_models_are_listed_also_at_zero_and_by_full_name_where_the_short_one_is_not_enough(shared: GatewayProcess) -> None:
    cards = {card["id"]: card for card in shared.get("/v1/models").json()["data"]}
    assert set(cards) == {"echo", "slow", "a/twice", "b/twice", "at-zero", "asleep"}
    assert (cards["echo"]["ready_replicas"], cards["at-zero"]["ready_replicas"]) == (1, 0)
    assert shared.get("/v1/models/a/twice").json()["id"] == "a/twice"
    assert shared.get("/v1/models/nobody").json()["error"]["code"] == "model_not_found"


def test_a_client_that_leaves_frees_its_blocks(shared: GatewayProcess, slow: ServerProcess) -> None:
    body = {**CHAT, "model": "slow", "stream": True, "max_tokens": 4000}
    with httpx.stream("POST", f"{shared.url}/v1/chat/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()  # which would close the stream, were it not kept
        assert "error" not in next(lines)
        assert shared.demand("default/slow")["running"] == 1
    shared.wait_demand("default/slow", running=0)
    wait_until(lambda: slow.metric("gantline_num_requests_running") == 0, what="the replica to run nothing")
    wait_until(lambda: slow.metric("gantline_kv_cache_usage_perc") == 0, what="the blocks to be free")


def test_tokens_are_counted_as_the_replica_counts_them(shared: GatewayProcess) -> None:
    def tokens(kind: str) -> float:
        page = shared.internal("/metrics").text
        found = re.search(rf'gantline_gateway_tokens_total{{kind="{kind}",namespace="default",service="echo"}} (\S+)', page)
        return float(found[1]) if found else 0.0

    before = tokens("prompt"), tokens("completion")
    usage = shared.post("/v1/chat/completions", CHAT).json()["usage"]
    stream = shared.post("/v1/chat/completions", {**CHAT, "stream": True}).text
    assert "usage" not in stream
    assert json.loads(stream.splitlines()[0][6:])["object"] == "chat.completion.chunk"
    both = {"prompt": 2 * usage["prompt_tokens"], "completion": 2 * usage["completion_tokens"]}
    wait_until(lambda: (tokens("prompt") - before[0], tokens("completion") - before[1]) == tuple(both.values()), what="both to be counted")
