"""Clients that ask for a stream and do not read it cost neither memory nor cache blocks for long, and hold up no exit."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.runtime.certificate_files import make_certificate
from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, events, read_all, read_metric, running, wait_until

MANY = 24
STALL_S = 2.0


@contextlib.contextmanager
def stalled_clients(server: ServerProcess, count: int, **fields: Any) -> Iterator[list[socket.socket]]:
    """`count` connections with a stream each, of which nobody reads anything."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect_slowly(server.url)) for _ in range(count)]
        for client in clients:
            client.sendall(request(**fields))
        yield clients


def connect_slowly(url: str) -> socket.socket:
    """A connection that takes little before its client reads."""
    host, port = url.partition("://")[2].split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(60)
    client.connect((host, int(port)))
    return client


def request(**fields: Any) -> bytes:
    body = json.dumps({"prompt": "abcdef", "max_tokens": 4000, "ignore_eos": True, "stream": True, "logprobs": 20, **fields}).encode()
    headers = ("Host: x", "Connection: close", "Content-Type: application/json", f"Content-Length: {len(body)}")
    return "\r\n".join(("POST /v1/completions HTTP/1.1", *headers, "", "")).encode() + body


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    script = {"step_seconds": 0.02, "endless": True, "num_cache_blocks": 1 << 15, "session_len": 1 << 16, "tokens_per_output": 16}
    model = write_model(tmp_path_factory.mktemp("stalled") / "m", **script)
    with running(model, "--drain-delay=0", "--drain-timeout=1", "--max-batch-size=64", f"--stall-timeout={STALL_S}") as server:
        yield server


def aborted(server: ServerProcess) -> float:
    return server.metric("gantline_request_success_total", finished_reason="abort")


def resident_mib(server: ServerProcess) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def body_of(answer: bytes) -> str:
    return answer.decode().partition("\r\n\r\n")[2]


def stall_until_cut_off(server: ServerProcess) -> None:
    before = aborted(server)
    with stalled_clients(server, MANY, max_tokens=60_000):
        wait_until(lambda: aborted(server) >= before + MANY, 100, "all are cut off")


def text_of(told: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["text"] for event in told)


def test_many_clients_that_do_not_read_leave_blocks_memory_and_others_alone(server: ServerProcess) -> None:
    resident = []
    with connect_slowly(server.url) as reader, concurrent.futures.ThreadPoolExecutor(1) as pool:
        reader.sendall(request(max_tokens=6000, logprobs=None))
        answer = pool.submit(read_all, reader)
        for _ in range(3):
            stall_until_cut_off(server)
            resident.append(resident_mib(server))
        told = events(body_of(answer.result(60)))
    assert text_of(told) == "abcdef" * 1000
    wait_until(lambda: server.metric("gantline_num_requests_running") == 0, what="nothing runs")
    wait_until(lambda: server.metric("gantline_kv_cache_usage_perc") == 0, what="every block is free")
    assert resident[2] < resident[0] + 64, f"{resident} MiB: two rounds have some 100 MiB of output that nobody took"


def test_a_slow_reader_is_not_cut_off(server: ServerProcess) -> None:
    """It takes some kilobytes a second, for three times as long as one that takes nothing has."""
    before = aborted(server)
    with connect_slowly(server.url) as reader:
        reader.sendall(request())
        taken = b""
        began = time.monotonic()
        while time.monotonic() - began < 3 * STALL_S:
            taken += reader.recv(2048)
            time.sleep(0.2)
        assert taken.count(b"data:") < 100, "it is far behind"
        taken += read_all(reader)
    assert "data: [DONE]" in body_of(taken)
    assert text_of(events(body_of(taken))) == ("abcdef" * 1000)[:4000]
    assert aborted(server) == before


def test_a_client_that_does_not_read_is_cut_off_with_tls_too(tmp_path: Path) -> None:
    trusted = ssl.create_default_context(cafile=make_certificate(tmp_path, "stalled"))
    model = write_model(
        tmp_path / "m", endless=True, num_cache_blocks=1 << 13, session_len=1 << 16, tokens_per_output=16, step_seconds=0.02
    )
    flags = (f"--tls-cert={tmp_path}/cert.pem", f"--tls-key={tmp_path}/key.pem", "--drain-delay=0", "--drain-timeout=1")
    with running(model, *flags, f"--stall-timeout={STALL_S}") as server, httpx.Client(verify=trusted) as client:

        def is_aborted() -> bool:
            return read_metric(client.get(f"{server.url}/metrics").text, "gantline_request_success_total", finished_reason="abort") == 1

        with trusted.wrap_socket(connect_slowly(server.url), server_hostname="127.0.0.1") as stalled:
            stalled.sendall(request(max_tokens=30_000))
            seconds = wait_until(is_aborted, 30, "it is cut off")
        assert seconds >= STALL_S
        assert not [line for line in server.logs if line["level"] == "error"]


def test_a_reader_that_is_too_far_behind_is_told_so(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", endless=True, num_cache_blocks=1 << 13, session_len=1 << 16, tokens_per_output=64)
    with running(model, "--drain-delay=0", "--drain-timeout=1") as server, connect_slowly(server.url) as reader:
        reader.sendall(request(max_tokens=60_000, logprobs=5))
        wait_until(lambda: server.metric("gantline_num_requests_running") == 1, what="it runs")
        wait_until(lambda: server.metric("gantline_num_requests_running") == 0, 60, "it is given up")
        told = events(body_of(read_all(reader)))
        assert told[-1]["error"]["code"] == "client_too_slow"
        text = text_of(told[:-1])
        assert 32_768 < len(text) < 60_000 and text == ("abcdef" * 10_000)[: len(text)]
        assert aborted(server) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_clients_that_do_not_read_hold_up_no_exit_and_readers_get_their_error(tmp_path: Path, workers: int) -> None:
    model = write_model(tmp_path / "m", step_seconds=0.02, endless=True, num_cache_blocks=1 << 15, tokens_per_output=16)
    flags = ("--drain-delay=0", "--drain-timeout=2", f"--api-workers={workers}", "--max-batch-size=64")
    server = ServerProcess(model, *flags).wait_ready()
    try:
        with stalled_clients(server, MANY), connect_slowly(server.url) as reader, concurrent.futures.ThreadPoolExecutor(1) as pool:
            wait_until(lambda: server.metric("gantline_generation_tokens_total") > MANY * 800, 60, "all buffers are full")
            reader.sendall(request(logprobs=None))
            begun = reader.recv(1)
            answer = pool.submit(read_all, reader)
            began = time.monotonic()
            server.terminate()
            assert server.wait_exit() == 0
            seconds = time.monotonic() - began
            told = events((begun + answer.result(10)).decode().partition("\r\n\r\n")[2])
    finally:
        server.stop()
    assert told[-1]["error"]["code"] == "shutting_down"
    assert server.termination["reason"] == "Drained" and f"{MANY + 1} requests were cut off" in server.termination["message"]
    assert seconds < 2 + 4
