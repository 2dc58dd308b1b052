"""Clients that ask for a stream and do not read it cost neither memory nor cache blocks for long, and hold up no exit."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, events, read_all, wait_until

MANY = 48


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
    host, port = url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(60)
    client.connect((host, int(port)))
    return client


def request(**fields: Any) -> bytes:
    body = json.dumps({"prompt": "abcdef", "max_tokens": 4000, "ignore_eos": True, "stream": True, "logprobs": 20, **fields}).encode()
    headers = ("Host: x", "Connection: close", "Content-Type: application/json", f"Content-Length: {len(body)}")
    return "\r\n".join(("POST /v1/completions HTTP/1.1", *headers, "", "")).encode() + body


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
