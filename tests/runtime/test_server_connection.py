"""Many connections are taken; those that never finish what they began are given up, and what is no HTTP gets an error like any other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvicorn
from gantline_runtime.server import connection
from gantline_runtime.server.listening import bind_socket

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, connect, few_files, read_all, running, wait_until

ANSWER = b"HTTP/1.1 200 OK"
FEW_FILES = 80
NO_REQUESTS = (
    b"GET /version HTTP/1.1\r\n\r\n" + b"\x00" * 8 + b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n",
)


def assert_no_request(answer: bytes) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == "invalid_http"


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(0.6 if scope["path"] == "/slow" else 0.0)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.4)
    config = uvicorn.Config(_app, http=connection.Connection, ws="none", lifespan="off", log_config=None)
    server, bound = uvicorn.Server(config), bind_socket("127.0.0.1", 0)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[bound])
    yield bound.getsockname()[1]
    for listener in server.servers:
        listener.close()


async def _seconds_until_closed(port: int, *pieces: bytes, pause_s: float = 0.15) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.monotonic()
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        assert await reader.read() == b""
    except ConnectionError:
        pass
    finally:
        writer.close()
    return time.monotonic() - began


@pytest.mark.parametrize("pieces", [(), (b"GET / HTTP/1.1\r\n",), tuple(bytes([b]) for b in b"GET / HTTP")])
async def test_a_head_that_does_not_come_ends_its_connection(port: int, pieces: tuple[bytes, ...]) -> None:
    """Silent, stopped in the middle, or a byte now and then."""
    assert 0.3 < await _seconds_until_closed(port, *pieces) < 3.0


async def test_what_of_a_body_comes_after_its_answer_has_an_end_too(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    for pieces in ((head,), (head, *(b"x" for _ in range(20)))):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.05)
        with contextlib.suppress(ConnectionError):
            assert (await asyncio.wait_for(reader.read(), 5)).startswith(ANSWER)
        assert time.monotonic() - began < 3.0
        writer.close()


async def test_a_body_that_follows_its_answer_in_time_keeps_the_connection(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500)
        assert (await asyncio.wait_for(reader.readuntil(b"ok"), 5)).startswith(ANSWER)
        writer.write(b"x" * 500)
        await asyncio.sleep(0.6)
    writer.close()


async def test_a_slow_answer_and_a_rest_between_requests_are_no_slow_head(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for path in (b"/slow", b"/"):
        writer.write(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await asyncio.wait_for(reader.readuntil(b"ok"), 5)).startswith(ANSWER)
        await asyncio.sleep(0.6)
    writer.write(b"GET / HT")
    await asyncio.sleep(0.1)
    writer.write(b"TP/1.1\r\nHost: x\r\n\r\n")
    assert (await asyncio.wait_for(reader.readuntil(b"ok"), 5)).startswith(ANSWER)
    writer.write(b"GET / HT")
    assert await asyncio.wait_for(reader.read(), 5) == b"", "the second head is waited for no longer than the first"
    writer.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with few_files(FEW_FILES):
        server = ServerProcess(write_model(tmp_path_factory.mktemp("connection") / "echo"), "--drain-delay=0")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_model(tmp_path_factory.mktemp("slow") / "slow", step_seconds=0.02, endless=True)
    with running(model, "--drain-delay=0", "--drain-timeout=1") as slow:
        yield slow


def test_a_server_takes_more_connections_than_it_may_have_files_at_first(server: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server.url)) for _ in range(2 * FEW_FILES)]
        for client in clients:
            client.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert {client.recv(len(ANSWER)) for client in clients} == {ANSWER}


@pytest.mark.parametrize("said", NO_REQUESTS)
def test_what_is_no_request_is_answered_with_an_error_of_the_one_shape(server: ServerProcess, said: bytes) -> None:
    with connect(server.url) as client:
        client.sendall(said)
        assert_no_request(read_all(client))


def line_ends_behind(request: bytes) -> tuple[bytes, ...]:
    """Pieces in which requests come with line ends before and behind them, as some clients write them."""
    return b"\r\n" + request + b"\r\n", b"\r", b"\n" + request + b"\r\n\r\n" + request.replace(b"Host", b"Connection: close\r\nHost")


def test_line_ends_between_requests_mean_nothing(server: ServerProcess) -> None:
    body = b'{"prompt": "ab", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with connect(server.url) as client:
        for piece in line_ends_behind(head + body):
            client.sendall(piece)
            time.sleep(0.2)
        answers = read_all(client)
    assert answers.count(ANSWER) == answers.count(b"HTTP/1.1") == 3


def test_a_request_may_name_the_whole_address(server: ServerProcess) -> None:
    """As whoever takes the server for a proxy writes it."""
    for target, status in ((b"http://x:80/v1/models?a=b", b"200 OK"), (b"http://x", b"404 Not Found"), (b"http://[", b"404 Not Found")):
        with connect(server.url) as client:
            client.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert read_all(client).startswith(b"HTTP/1.1 " + status), target


@pytest.mark.parametrize("more", [b"", b"\r\n", b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_client_that_leaves_is_noticed_whatever_it_sent_after_its_request(slow: ServerProcess, more: bytes) -> None:
    body = b'{"prompt": "a", "max_tokens": 4000, "ignore_eos": true}'
    before = slow.metric("gantline_request_success_total", finished_reason="abort")
    with connect(slow.url) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        wait_until(lambda: slow.metric("gantline_num_requests_running") == 1, what="it runs")
        client.sendall(more)
        time.sleep(0.3)
    wait_until(lambda: slow.metric("gantline_request_success_total", finished_reason="abort") > before, what="it is aborted")
    wait_until(lambda: slow.metric("gantline_num_requests_running") == 0, what="nothing runs")


def test_requests_that_follow_each_other_at_once_are_answered_in_their_order(server: ServerProcess) -> None:
    with connect(server.url) as client:
        client.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        first, second = read_all(client).split(ANSWER)[1:]
    assert b'{"version"' in first and b'"object":"list"' in second


def test_a_client_that_is_gone_without_a_word_is_given_up_within_a_minute() -> None:
    with bind_socket("127.0.0.1", 0) as bound:
        assert bound.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert bound.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        client = socket.create_connection(bound.getsockname())
        accepted, _ = bound.accept()
        idle, interval, count = (
            accepted.getsockopt(socket.IPPROTO_TCP, o) for o in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and idle + interval * count <= 60
        accepted.close()
        client.close()
