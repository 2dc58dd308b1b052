"""A workload through the server: every request an HTTP stream of its own, all there at once.

Clients are a few processes, since one that reads 13,000 events a second is busy with that alone. They read just enough of the protocol to
be faster than the server: an event is a line that begins with `data: `, the last but one carries the usage.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["HttpRun", "Prompt", "run_over_http", "served_name"]

_CLIENTS = 4
_LINE_BYTES = 1 << 20

Prompt = list[int] | str
Requests = Sequence[tuple[Prompt, int]]


@dataclass(frozen=True)
class HttpRun:
    """Seconds of the whole, of each request the time to its first event and between its events (mean), and events of all."""

    seconds: float
    first_s: list[float]
    between_s: list[float]
    events: int

    def summary(self) -> dict[str, float]:
        return {
            "seconds": round(self.seconds, 3),
            "first_ms_median": round(statistics.median(self.first_s) * 1e3, 1),
            "events": self.events,
            "between_ms_median": round(statistics.median(self.between_s) * 1e3, 2) if self.between_s else 0.0,
        }


def served_name(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as answer:
        return str(json.load(answer)["data"][0]["id"])


def run_over_http(port: int, requests: Requests, clients: int = _CLIENTS) -> HttpRun:
    """Stream every request to its end. Raises RuntimeError if one is refused or has too few or too many tokens."""
    name, context = served_name(port), multiprocessing.get_context("fork")
    bodies = [json.dumps(_body(name, prompt, count)).encode() for prompt, count in requests]
    counts = [count for _, count in requests]
    with context.Pool(clients) as pool:
        pool.map(abs, range(clients))  # all are there
        started = time.perf_counter()
        parts = pool.starmap(_client, [(port, bodies[i::clients], counts[i::clients]) for i in range(clients)], chunksize=1)
        seconds = time.perf_counter() - started
    times = [entry for part in parts for entry in part]
    firsts, betweens, events = zip(*times, strict=True)
    return HttpRun(seconds, list(firsts), [between for between in betweens if between], sum(events))


def _body(name: str, prompt: Prompt, count: int) -> dict[str, Any]:
    return {
        "model": name, "prompt": prompt, "max_tokens": count, "temperature": 0.0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def _client(port: int, bodies: list[bytes], counts: list[int]) -> list[tuple[float, float, int]]:
    async def run() -> list[tuple[float, float, int]]:
        return await asyncio.gather(*(_stream(port, body, count) for body, count in zip(bodies, counts, strict=True)))

    return asyncio.run(run())


async def _stream(port: int, body: bytes, count: int) -> tuple[float, float, int]:
    """(seconds to the first event, mean seconds between events, events)."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_LINE_BYTES)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
    status = await reader.readline()
    first = last = 0.0
    num_events, usage = 0, b""
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            last = time.perf_counter()
            first = first or last
            num_events += 1
            usage = line
    writer.close()
    if b" 200 " not in status:
        raise RuntimeError(f"a request was refused: {status.decode().strip()}")
    got = ((json.loads(usage[6:]) if usage else {}).get("usage") or {}).get("completion_tokens")
    if got != count:
        raise RuntimeError(f"a request for {count} tokens ended with {got}")
    return first - started, (last - first) / (num_events - 1) if num_events > 1 else 0.0, num_events
