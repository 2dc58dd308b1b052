"""A service's only replica is replaced by another one, as on the only GPU there is, while clients stream: none of them notices."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.gateway_process import gateway, write_services
from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, events, read_metric, wait_until

pytestmark = pytest.mark.skipif(not os.environ.get("GANTLINE_FULL_MATRIX"), reason="starts six servers; GANTLINE_FULL_MATRIX=1 runs it")

STREAMS, SWAPS, TOKENS = 32, 5, 60


def test_every_stream_completes_while_the_only_replica_is_swapped(tmp_path: Path) -> None:
    model, file = write_model(tmp_path / "model", endless=True, step_seconds=0.02), tmp_path / "services.json"

    def offer(*replicas: ServerProcess) -> Path:
        return write_services(file, {"name": "model", "replicas": [server.url for server in replicas], "wanted": 1})

    server = ServerProcess(model).wait_ready()
    done: list[httpx.Response] = []
    stop = False

    def stream_on(url: str) -> None:
        body: dict[str, Any] = {
            "model": "model", "messages": [{"role": "user", "content": "x"}], "max_tokens": TOKENS, "stream": True,
        }  # fmt: skip
        with httpx.Client(timeout=120) as client:
            while not stop:
                done.append(client.post(f"{url}/v1/chat/completions", json=body))

    with gateway(offer(server)) as process, ThreadPoolExecutor(STREAMS) as pool:
        clients = [pool.submit(stream_on, process.url) for _ in range(STREAMS)]
        try:
            for _ in range(SWAPS):
                server.terminate()
                offer()
                assert server.wait_exit(120) == 0
                server = ServerProcess(model).wait_ready()
                offer(server)
                enough = len(done) + STREAMS
                wait_until(lambda enough=enough: len(done) >= enough, timeout_s=120, what="streams to go on")  # type: ignore[misc]
        finally:
            stop = True
        for client in clients:
            client.result()
        held = read_metric(process.internal("/metrics").text, "gantline_gateway_held_seconds_count", service="model")
    server.stop()
    assert held >= SWAPS
    for answer in done:
        assert answer.status_code == 200
        assert answer.text.endswith("data: [DONE]\n\n"), events(answer.text)[-1]
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events(answer.text))
        assert len(text) == TOKENS
    print(f"{len(done)} streams completed over {SWAPS} swaps, {held:.0f} of them after waiting")
