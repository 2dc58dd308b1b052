"""Clients of the gateway that stop to read, or are slow to send, cost it nothing for long, and no other client anything."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.gateway.gateway_process import GatewayProcess, gateway, write_services
from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, connect, events, read_all, running, wait_until
from tests.runtime.test_server_stalled_clients import body_of, connect_slowly, text_of

STALL_S, HEAD_S, BODY_S = 1.5, 1.0, 4.0
MANY = 16


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    script = {"step_seconds": 0.02, "endless": True, "num_cache_blocks": 1 << 14, "session_len": 1 << 16, "tokens_per_output": 16}
    model = write_model(tmp_path_factory.mktemp("replica") / "m", **script)
    with running(model, "--drain-delay=0", "--drain-timeout=1", "--max-batch-size=32", "--served-model-name=m") as server:
        yield server


@pytest.fixture(scope="module")
def process(replica: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    services = write_services(tmp_path_factory.mktemp("slow") / "services.json", {"name": "m", "replicas": [replica.url]})
    bounds = (f"--stall-timeout={STALL_S}", f"--head-timeout={HEAD_S}", f"--body-timeout={BODY_S}", "--body-bytes=20000")
    with gateway(services, *bounds, "--drain-timeout=1") as process:
        yield process


def request(body: bytes, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    headers = ("Host: x", "Connection: close", "Content-Type: application/json", f"Content-Length: {length}")
    return "\r\n".join(("POST /v1/completions HTTP/1.1", *headers, "", "")).encode() + body


def question(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "abcdef", "max_tokens": 4000, "ignore_eos": True, "stream": True, **fields}).encode()


def error_code(answer: bytes) -> tuple[int, str]:
    return int(answer.split(b" ")[1]), json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]


def test_clients_that_do_not_read_are_cut_off_and_their_requests_ended_at_the_replica(
    process: GatewayProcess, replica: ServerProcess
) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MANY):
            client = stack.enter_context(connect_slowly(process.url))
            client.sendall(request(question(max_tokens=60_000, logprobs=20)))
        process.wait_demand("default/m", running=MANY)
        took = wait_until(lambda: process.demand("default/m")["running"] == 0, 60, "all are cut off")
        assert took >= STALL_S
    wait_until(lambda: replica.metric("gantline_num_requests_running") == 0, what="the replica runs nothing")
    assert replica.metric("gantline_request_success_total", finished_reason="abort") == MANY
    assert len([line for line in process.logs if line["message"] == "a client does not read its answer"]) == MANY
    assert not [line for line in process.logs if line["level"] == "error"]


def test_a_slow_reader_is_not_cut_off(process: GatewayProcess) -> None:
    """It takes some kilobytes a second, for three times as long as one that takes nothing has."""
    with connect_slowly(process.url) as reader:
        reader.sendall(request(question(logprobs=20)))
        taken, began = b"", time.monotonic()
        while time.monotonic() - began < 3 * STALL_S:
            taken += reader.recv(2048)
            time.sleep(0.2)
        taken += read_all(reader)
    assert "data: [DONE]" in body_of(taken)
    assert text_of([event for event in events(body_of(taken)) if event["choices"]]) == ("abcdef" * 1000)[:4000]


@pytest.mark.parametrize("pieces", [(), (b"POST /v1/comp",), tuple(bytes([b]) for b in b"POST /v1/comp")])
def test_a_head_that_does_not_come_ends_its_connection(process: GatewayProcess, pieces: tuple[bytes, ...]) -> None:
    """Silent, stopped in the middle, or a byte now and then."""
    began = time.monotonic()
    with connect(process.url) as client, contextlib.suppress(ConnectionError):
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.1)
        assert client.recv(1) == b""
    assert HEAD_S - 0.2 < time.monotonic() - began < HEAD_S + 4


def test_a_body_of_which_nothing_more_comes_is_given_up_and_so_is_one_that_comes_too_slowly(process: GatewayProcess) -> None:
    began = time.monotonic()
    with connect(process.url) as client:
        client.sendall(request(b"{", 100))
        answer = read_all(client)
    assert error_code(answer) == (408, "request_timeout") and STALL_S - 0.1 < time.monotonic() - began < BODY_S
    began = time.monotonic()
    with connect(process.url) as client:
        client.sendall(request(b"{", 100))
        while (so_far := time.monotonic() - began) < BODY_S + 3 and not _has_answer(client):
            client.sendall(b" ")
        answer = read_all(client)
    assert error_code(answer) == (408, "request_timeout") and BODY_S - 0.5 < so_far < BODY_S + 2


def _has_answer(client: socket.socket) -> bool:
    client.settimeout(0.3)
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        client.settimeout(60)


def test_what_of_a_body_comes_after_its_answer_has_an_end_too(process: GatewayProcess) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    for more in (b"", b"x"):
        began = time.monotonic()
        with connect(process.url) as client:
            client.sendall(head)
            answer = b""
            while not answer.endswith(b"}}"):
                answer += client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 404")
            client.sendall(more)
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""
        assert time.monotonic() - began < HEAD_S + 4


def test_bodies_that_are_only_announced_take_no_room_from_others(process: GatewayProcess) -> None:
    """`--body-bytes` is 20,000: three of these would fill it."""
    with contextlib.ExitStack() as stack:
        for _ in range(MANY):
            stack.enter_context(connect(process.url)).sendall(request(b"{", 9000))
        answer = process.post("/v1/completions", {"model": "m", "prompt": "a" * 5000, "max_tokens": 1})
        assert answer.status_code == 200
        late = [stack.enter_context(connect(process.url)) for _ in range(3)]
        for client in late:
            client.sendall(request(b" " * 8000, 9000))
        assert error_code(read_all(late[2])) == (503, "overloaded"), "what has come counts"
