"""A gateway holds many connections, and tells those that speak no HTTP what is wrong, as the server does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.gateway.gateway_process import GatewayProcess, write_services
from tests.runtime.server_process import connect, few_files, read_all
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
