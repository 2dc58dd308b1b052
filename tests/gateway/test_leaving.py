"""Clients that come and go at random, as on any real day, leave nothing behind: neither here nor at a replica."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import pytest

from tests.gateway.gateway_process import GatewayProcess
from tests.runtime.server_process import ServerProcess, connect, read_metric, wait_until

_CLIENTS = 40


async def visit(url: str, body: dict[str, Any], stay_s: float) -> None:
    """Asks, and is gone after a while, whatever was said by then."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data[: len(data) if stay_s > 0.02 else 10])
    try:
        async with asyncio.timeout(stay_s):
            while await reader.read(1 << 16):
                pass
    except TimeoutError:
        writer.transport.abort()


@pytest.mark.parametrize("more", [b"\r\n", b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_client_that_leaves_is_noticed_whatever_it_sent_after_its_request(
    shared: GatewayProcess, slow: ServerProcess, more: bytes
) -> None:
    body = json.dumps({"model": "slow", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3000}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with connect(shared.url) as client:
        client.sendall(head.encode() + body)
        wait_until(lambda: slow.metric("gantline_num_requests_running") == 1, what="it runs")
        for piece in (more, more):
            client.sendall(piece)
            time.sleep(0.2)
    wait_until(lambda: slow.metric("gantline_num_requests_running") == 0, 10, what="the replica to run nothing")
    shared.wait_demand("default/slow", running=0, held=0)


async def test_clients_that_leave_at_random_leave_nothing_behind(shared: GatewayProcess, slow: ServerProcess) -> None:
    choose = random.Random(7)
    visits = []
    for number in range(_CLIENTS):
        model, stream = choose.choice(["slow", "slow", "at-zero"]), bool(number % 2)
        body = {"model": model, "messages": [{"role": "user", "content": "x" * number}], "max_tokens": 1000, "stream": stream}
        visits.append(visit(shared.url, body, choose.uniform(0.0, 0.6)))
    await asyncio.gather(*visits)

    def left() -> float:
        page = shared.internal("/metrics").text
        return sum(read_metric(page, "gantline_gateway_requests_total", 0.0, service=name, outcome="left") for name in ("slow", "at-zero"))

    shared.wait_demand("default/slow", running=0, held=0)
    shared.wait_demand("default/at-zero", running=0, held=0)
    wait_until(lambda: slow.metric("gantline_num_requests_running") == 0, what="the replica to run nothing")
    wait_until(lambda: slow.metric("gantline_kv_cache_usage_perc") == 0, what="the blocks to be free")
    assert left() > _CLIENTS / 2
