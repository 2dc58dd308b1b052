"""A gateway holds many connections, and tells those that speak no HTTP what is wrong, as the server does."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest

from tests.gateway.gateway_process import GatewayProcess, write_services
from tests.runtime.server_process import ServerProcess, connect, few_files, read_all
from tests.runtime.test_server_connection import ANSWER, FEW_FILES, NO_REQUESTS, assert_no_request, line_ends_behind


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    services = write_services(tmp_path_factory.mktemp("connections") / "services.json")
    with few_files(FEW_FILES):
        process = GatewayProcess(f"--services={services}", "--drain-delay=0")
    try:
        yield process.wait_listening()
    finally:
        process.stop()


def test_a_gateway_takes_more_connections_than_it_may_have_files_at_first(idle: GatewayProcess) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(idle.url)) for _ in range(2 * FEW_FILES)]
        for client in clients:
            client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert {client.recv(len(ANSWER)) for client in clients} == {ANSWER}


@pytest.mark.parametrize("said", NO_REQUESTS[1:])
def test_what_is_no_request_is_answered_with_an_error_of_the_one_shape(idle: GatewayProcess, said: bytes) -> None:
    with connect(idle.url) as client:
        client.sendall(said)
        assert_no_request(read_all(client))


def test_line_ends_between_requests_mean_nothing_and_one_may_name_the_whole_address(idle: GatewayProcess) -> None:
    with connect(idle.url) as client:
        for piece in line_ends_behind(b"GET http://x/v1/models HTTP/1.1\r\nHost: x\r\n\r\n"):
            client.sendall(piece)
        answers = read_all(client)
    assert answers.count(ANSWER) == answers.count(b"HTTP/1.1") == 3


def test_a_client_that_knows_no_chunks_gets_a_stream_as_it_is(shared: GatewayProcess, slow: ServerProcess) -> None:
    body = json.dumps({"model": "slow", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 5, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with connect(shared.url) as client:
        client.sendall(head.encode() + body)
        answer_head, _, told = read_all(client).partition(b"\r\n\r\n")
    assert answer_head.startswith(ANSWER) and b"transfer-encoding" not in answer_head.lower()
    assert all(line.startswith(b"data: ") for line in told.splitlines() if line) and told.endswith(b"data: [DONE]\n\n")
    with connect(shared.url) as client:
        client.sendall(b"GET /v1/models HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        answer_head, _, told = read_all(client).partition(b"\r\n\r\n")
    assert f"content-length: {len(told)}".encode() in answer_head.lower() and json.loads(told)["object"] == "list"


def test_a_look_at_the_models_needs_no_body(shared: GatewayProcess) -> None:
    answer = shared.send("HEAD", "/v1/models")
    assert answer.status_code == 200 and not answer.content and int(answer.headers["content-length"]) > 2
    assert shared.send("HEAD", "/v1/chat/completions").status_code == 405


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a_body_nested_too_deeply_is_no_json_and_no_fault_of_ours(shared: GatewayProcess, opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"
    body = b'{"model": "slow", "prompt": ' + opening * 100_000 + b"1" + closing * 100_000 + b"}"
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
        answer = shared.send("POST", path, content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
