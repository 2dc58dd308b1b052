"""What the HTTP side costs by itself: `python -m benchmarks.http_layer [--clients 256] [--steps-per-second 20] [--seconds 10]`.

`gantline serve` with the tokenizer of examples/tiny-model and an engine that answers at once: each step gives every request one token, and
steps come at a fixed rate, so that each token is an event of its own. Clients stream chats over keep-alive connections from a process of
their own. Printed: events a second, the processor time of the API process for one of them, and so the tokens a second that one
API worker can stream with a core of its own. `--steps-per-second 0` has the engine go on at once: then events carry several tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gantline_runtime.config import EngineConfig
from gantline_runtime.engine_loop import StepTimes
from gantline_runtime.messages import EngineRequest, FinishReason, TokenLogprobs, TokenOutput

ROOT = Path(__file__).resolve().parents[1]
_MODEL = ROOT / "examples" / "tiny-model"
_ENGINE = "benchmarks.http_layer:InstantEngine"
_ANSWER_TOKENS = 200
_TICKS = os.sysconf("SC_CLK_TCK")


class _Nothing:
    """Stats and memory of an engine that has none."""

    def __getattr__(self, name: str) -> Any:
        return {"step_times": StepTimes(), "memory": self, "about": {}}.get(name, 0)


class InstantEngine:
    """Tokens of plain text, one for each request in every step."""

    session_len = 2048
    eos_token_ids: Sequence[int] = ()

    def __init__(self, model_dir: str, config: EngineConfig, on_progress: Callable[[Any], None] | None = None) -> None:
        self._left: dict[str, int] = {}
        self._scored: set[str] = set()
        """Requests that want log-probabilities, as the server's own first one does."""
        rate = float(os.environ.get("GANTLINE_STEPS_PER_SECOND", "0"))
        self._period, self._next = (1 / rate if rate else 0.0), 0.0

    def add_request(self, request: EngineRequest) -> None:
        self._left[request.request_id] = request.sampling.max_new_tokens
        if request.sampling.num_logprobs is not None:
            self._scored.add(request.request_id)

    def abort(self, request_id: str, num_tokens: int | None = None) -> bool:
        self._scored.discard(request_id)
        return self._left.pop(request_id, None) is not None

    def has_work(self) -> bool:
        return bool(self._left)

    def step(self) -> list[TokenOutput]:
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = max(time.monotonic(), self._next + self._period) if self._period else 0.0
        outputs = []
        for name, left in list(self._left.items()):
            self._left[name] = left - 1
            if left == 1:
                del self._left[name]
            logprobs = [TokenLogprobs(-0.1, [], [])] if name in self._scored else None
            reason: FinishReason | None = "length" if left == 1 else None
            outputs.append(TokenOutput(request_id=name, token_ids=[300 + left % 1000], logprobs=logprobs, finish_reason=reason))
        return outputs

    def prepare(self) -> bool:
        return False

    def stats(self) -> Any:
        return _Nothing()

    def prefix_marks(self) -> list[int]:
        return []

    def take_prefix_changes(self) -> tuple[list[int], list[int]]:
        return [], []

    def close(self) -> None:
        pass


def serve(arguments: list[str]) -> int:
    """`gantline serve` with `InstantEngine`."""
    from gantline_runtime import cli
    from gantline_runtime.commands import serve as command

    original = command.run
    command.run = lambda args: original(args, engine=_ENGINE)  # type: ignore[assignment,misc]
    return cli.main(["serve", *arguments])


async def _client(host: str, port: int, counts: dict[str, int], stop: asyncio.Event) -> None:
    """Streams one chat after the other and counts events; written by hand, so that it costs less than the server does."""
    body = json.dumps(
        {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": _ANSWER_TOKENS, "ignore_eos": True, "stream": True}
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    while not stop.is_set():
        writer.write(head.encode() + body)
        rest = b""
        while b"data: [DONE]" not in rest:
            data = await reader.read(1 << 16)
            if not data:
                raise RuntimeError(f"the server closed the connection: {rest[-300:]!r}")
            counts["events"] += data.count(b'"delta"')
            rest = rest[-32:] + data
        counts["answers"] += 1
    writer.close()


async def _measure(url: str, clients: int, seconds: float, warm_up: float, cpu: Callable[[], float]) -> dict[str, float]:
    host, port = url.removeprefix("http://").split(":")
    counts, stop = {"events": 0, "answers": 0}, asyncio.Event()
    tasks = [asyncio.create_task(_client(host, int(port), counts, stop)) for _ in range(clients)]
    await asyncio.sleep(warm_up)
    before, began, used = dict(counts), time.monotonic(), cpu()
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()
    elapsed, used = time.monotonic() - began, cpu() - used
    events = counts["events"] - before["events"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {"events": events, "seconds": elapsed, "cpu_seconds": used}


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--steps-per-second", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, default=5.0)
    options = parser.parse_args()
    environment = {**os.environ, "GANTLINE_STEPS_PER_SECOND": str(options.steps_per_second), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.http_layer", "serve", str(_MODEL), "--port=0", "--log-format=json", "--drain-delay=0"]
    flags = ["--drain-timeout=0", f"--max-batch-size={options.clients}"]
    server = subprocess.Popen([*command, *flags], env=environment, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert server.stderr is not None
        url = next(json.loads(line)["url"] for line in server.stderr if '"ready"' in line and line.startswith("{"))
        threading.Thread(target=server.stderr.read, daemon=True).start()
        found = asyncio.run(_measure(url, options.clients, options.seconds, options.warm_up, lambda: _cpu_seconds(server.pid)))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    per_event = found["cpu_seconds"] / max(1, found["events"])
    print(
        json.dumps(
            {
                "clients": options.clients,
                "events_per_second": round(found["events"] / found["seconds"]),
                "api_cpu_share": round(found["cpu_seconds"] / found["seconds"], 2),
                "api_cpu_us_per_event": round(1e6 * per_event, 1),
                "events_per_second_and_core": round(1 / per_event),
            }
        )
    )


if __name__ == "__main__":
    main()
