"""The gateway's end: nobody is sent to it any more, and what runs goes on as long as it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from tests.gateway.gateway_process import GatewayProcess, write_services
from tests.runtime.server_process import ServerProcess, events, wait_until

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


def test_a_drain_takes_latecomers_lets_streams_go_on_and_ends_them_with_an_error_event(
    tmp_path: Path, slow: ServerProcess, echo: ServerProcess
) -> None:
    offered = [{"name": "slow", "replicas": [slow.url]}, {"name": "echo", "replicas": [echo.url]}]
    file = write_services(tmp_path / "services.json", *offered)
    process = GatewayProcess(f"--services={file}", "--drain-delay=1.5", "--drain-timeout=3").wait_listening()
    try:
        assert process.internal("/readyz").status_code == 200
        body = {**CHAT, "model": "slow", "stream": True, "max_tokens": 4000}
        with httpx.stream("POST", f"{process.url}/v1/chat/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.terminate()
            wait_until(lambda: process.internal("/readyz").status_code == 503, what="the gateway to be unready")
            assert process.internal("/healthz").status_code == 200
            late = process.post("/v1/chat/completions", {**CHAT, "model": "echo"})
            assert (late.status_code, late.headers["connection"]) == (200, "close")
            rest = "\n".join(lines)
        assert events(rest)[-1]["error"]["code"] == "shutting_down"
        assert len(events(rest)) > 3
        assert process.wait_exit() == 0
        assert process.wait_log("drained")["unfinished"] == 1
    finally:
        process.stop()
    wait_until(lambda: slow.metric("gantline_num_requests_running") == 0, what="the replica to run nothing")
