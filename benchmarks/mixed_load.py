"""Clients as they are: `python -m benchmarks.mixed_load [--minutes 3] [--model DIR] [--clients 24]`.

Streams, whole answers, several choices, deadlines, nonsense, gateways that ask what is cached, and clients that leave at any moment: before
the answer, in its middle, in the middle of their own request. Ends with every request accounted for, every block of the cache free and
nothing unexpected answered; prints how the memory of the API process and of the engine grew after the warm-up (the first third). Exit code
1 if something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
_EXPECTED = {200, 400, 429, 504}
_MOST_DRIFT = 0.01


@dataclass
class Load:
    """What random clients did to the server at `url`, and what they got. `outcomes` counts by behaviour and result."""

    url: str
    seed: int = 0
    most_tokens: int = 120
    most_words: int = 60
    """Of a prompt."""
    outcomes: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    _cursor: str = ""

    async def run(self, clients: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=clients * 2, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._one(client, random.Random(f"{self.seed}-{i}"), until) for i in range(clients)))

    async def _one(self, client: httpx.AsyncClient, rng: random.Random, until: float) -> None:
        behaviours = (self._stream, self._stream, self._whole, self._leave_stream, self._leave_stream, self._leave_whole)
        behaviours += (self._leave_request, self._nonsense, self._hurry, self._tokenize, self._ask_prefixes)
        while time.monotonic() < until:
            behaviour = rng.choice(behaviours)
            name = behaviour.__name__.strip("_")
            try:
                result = await behaviour(client, rng)
            except Exception as error:
                result = type(error).__name__
                self.surprises.append(f"{name}: {error!r}")
            self.outcomes[f"{name} {result}"] += 1

    def _body(self, rng: random.Random, **fields: Any) -> dict[str, Any]:
        text = " ".join(rng.choice(("one", "two", "three", "four")) for _ in range(rng.randint(1, self.most_words)))
        sampling = rng.choice(({}, {"temperature": 0.0}, {"top_p": 0.9, "seed": rng.randrange(1000)}, {"presence_penalty": 0.5}))
        return {"prompt": text, "max_tokens": rng.randint(1, self.most_tokens), "ignore_eos": rng.random() < 0.5, **sampling, **fields}

    def _check(self, status: int, body: str) -> str:
        if status not in _EXPECTED:
            self.surprises.append(f"{status}: {body[:300]}")
        return str(status)

    async def _stream(self, client: httpx.AsyncClient, rng: random.Random) -> str:
        async with client.stream("POST", "/v1/completions", json=self._body(rng, stream=True, n=rng.choice((1, 1, 3)))) as response:
            text = (await response.aread()).decode()
        if response.status_code == 200 and not text.endswith("data: [DONE]\n\n"):
            self.surprises.append(f"a stream ended with {text[-200:]!r}")
        return self._check(response.status_code, text)

    async def _whole(self, client: httpx.AsyncClient, rng: random.Random) -> str:
        response = await client.post("/v1/completions", json=self._body(rng, logprobs=rng.choice((None, 2))))
        return self._check(response.status_code, response.text)

    async def _leave_stream(self, client: httpx.AsyncClient, rng: random.Random) -> str:
        read, wanted = 0, rng.randint(0, 20)
        async with client.stream("POST", "/v1/completions", json=self._body(rng, stream=True)) as response:
            async for _ in response.aiter_lines():
                read += 1
                if read > wanted:
                    break
        return "left"

    async def _leave_whole(self, client: httpx.AsyncClient, rng: random.Random) -> str:
        try:
            async with asyncio.timeout(rng.uniform(0.0, 0.2)):
                await client.post("/v1/completions", json=self._body(rng))
        except TimeoutError:
            return "left"
        return "answered"

    async def _leave_request(self, client: httpx.AsyncClient, rng: random.Random) -> str:
        """Closes the connection anywhere in its own request."""
        body = json.dumps(self._body(rng)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        data = head.encode() + body
        _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(data[: rng.randint(1, len(data))])
        await writer.drain()
        await asyncio.sleep(rng.uniform(0.0, 0.05))
        writer.transport.abort()
        return "left"

    async def _nonsense(self, client: httpx.AsyncClient, rng: random.Random) -> str:
        body = rng.choice(({}, {"prompt": "a", "max_tokens": -1}, {"prompt": [], "n": 2}, {"prompt": "a", "unknown": 1}, []))
        response = await client.post("/v1/completions", json=body)
        if response.status_code != 400:
            self.surprises.append(f"nonsense was answered with {response.status_code}")
        return str(response.status_code)

    async def _hurry(self, client: httpx.AsyncClient, rng: random.Random) -> str:
        response = await client.post("/v1/completions", json=self._body(rng, timeout=rng.uniform(0.001, 0.3)))
        return self._check(response.status_code, response.text)

    async def _tokenize(self, client: httpx.AsyncClient, rng: random.Random) -> str:
        response = await client.post("/tokenize", json={"prompt": "x" * rng.randint(0, 5000)})
        return self._check(response.status_code, response.text)

    async def _ask_prefixes(self, client: httpx.AsyncClient, rng: random.Random) -> str:
        """As a gateway that has asked before, or one that has just come."""
        since = rng.choice((self._cursor, ""))
        response = await client.get("/internal/prefixes", params={"since": since})
        self._cursor = response.json()["cursor"]
        return self._check(response.status_code, response.text)


def read_gauges(url: str) -> dict[str, float]:
    """What must be zero when nobody asks any more."""
    lines = httpx.get(url + "/metrics", timeout=30).text.splitlines()
    names = ("gantline_num_requests_running", "gantline_num_requests_waiting", "gantline_waiting_tokens", "gantline_kv_cache_usage_perc")
    return {name: float(line.split()[-1]) for line in lines for name in names if line.startswith(name + " ")}


def wait_until_free(url: str, timeout_s: float = 20.0) -> dict[str, float]:
    """The gauges, once all are zero or time is up."""
    deadline = time.monotonic() + timeout_s
    while any((gauges := read_gauges(url)).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return gauges


class _Memory(threading.Thread):
    """Samples the resident memory of processes."""

    def __init__(self, pids: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self._pids = pids
        self.samples: dict[str, list[int]] = {name: [] for name in pids}

    def run(self) -> None:
        while True:
            for name, pid in self._pids.items():
                try:
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                except OSError:
                    return
                self.samples[name].append(pages * os.sysconf("SC_PAGE_SIZE"))
            time.sleep(1.0)

    def drift(self, name: str) -> tuple[float, float]:
        """(MiB after the warm-up, growth from there to the end as a share): medians of the second and the last sixth."""
        samples = self.samples[name]
        sixth = max(1, len(samples) // 6)
        before, after = statistics.median(samples[2 * sixth : 3 * sixth] or samples), statistics.median(samples[-sixth:])
        return before / 2**20, after / before - 1


def _children(pid: int) -> dict[str, int]:
    pids = {"api": pid}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"gantline_runtime.engine_process" in Path(f"/proc/{child}/cmdline").read_bytes():
            pids["engine"] = int(child)
    return pids


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-model")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=24)
    options = parser.parse_args()
    command = [sys.executable, "-m", "gantline_runtime.cli", "serve", str(options.model), "--port=0", "--log-format=json"]
    command += ["--drain-delay=0", "--log-level=info", "--max-batch-size=16", "--max-waiting=16"]
    command += ["--num-cache-blocks=96"]  # all of it is touched within the warm-up: memory that grows afterwards is a leak
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert server.stderr is not None
    log: Counter[str] = Counter()
    url = ""
    for line in server.stderr:
        if line.startswith("{") and json.loads(line)["message"] == "ready":
            url = json.loads(line)["url"]
            break
    stderr = server.stderr
    threading.Thread(target=lambda: log.update(json.loads(x)["level"] for x in stderr if x.startswith("{")), daemon=True).start()
    memory = _Memory(_children(server.pid))
    memory.start()
    load = Load(url, most_words=150)
    asyncio.run(load.run(options.clients, 60 * options.minutes))
    gauges = wait_until_free(url)
    drifts = {name: memory.drift(name) for name in memory.samples}
    server.send_signal(signal.SIGTERM)
    code = server.wait(60)
    print(
        json.dumps({"minutes": options.minutes, "requests": sum(load.outcomes.values()), "outcomes": dict(sorted(load.outcomes.items()))})
    )
    print(json.dumps({name: {"mib": round(mib, 1), "drift": f"{share:+.2%}"} for name, (mib, share) in drifts.items()}))
    print(json.dumps({"left": gauges, "exit_code": code, "log": dict(log), "surprises": load.surprises[:10]}))
    flat = all(share < _MOST_DRIFT for _, share in drifts.values())
    return int(bool(load.surprises) or any(gauges.values()) or code != 0 or log["error"] > 0 or not flat)


if __name__ == "__main__":
    sys.exit(main())
