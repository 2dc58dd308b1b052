"""Which replica's cache a prompt meets: `python -m benchmarks.prefix_routing [--replicas 4] [--prefixes 64] [--requests 2000]`.

Real servers whose caches each hold a part of the prefixes that prompts share, and whose model takes time for every prompt token that is not
cached. The same requests are sent twice, by the same number of clients: through a real gateway, and to the servers in turns. Printed: the
share of prompt tokens that caches had (by the servers' own counts), requests and prompt tokens a second, the busiest replica's share of the
requests, and the gateway's ratio to turns.
Exit code 1 below `--must` times the hit rate of turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from tests.runtime.server_fakes import write_model

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = 64
_PREFIX_BYTES = 1536
"""As many tokens, of the test model's tokenizer: 24 blocks."""
_QUESTION_BYTES = 60
_SPARE_BLOCKS = 32
"""For what runs at once beside the prefixes."""


@dataclass(frozen=True)
class Setting:
    """`cached`: prefixes that one cache holds; `token_us`: microseconds for a prompt token that is not cached; `common`: bytes with which
    all prompts begin alike, before their prefixes."""

    replicas: int = 4
    prefixes: int = 64
    cached: int = 24
    requests: int = 2000
    clients: int = 16
    token_us: float = 100.0
    common: int = 0

    @property
    def blocks(self) -> int:
        """Of one cache."""
        return self.cached * (_PREFIX_BYTES // _BLOCK) + self.common // _BLOCK + _SPARE_BLOCKS


@dataclass(frozen=True)
class Outcome:
    hit_rate: float
    requests_per_s: float
    prompt_tokens_per_s: float
    busiest: float = 0.0
    """Share of all requests that the busiest replica had."""


def make_requests(setting: Setting, seed: int = 0) -> list[dict[str, Any]]:
    """Chats, each behind one of the prefixes, at random. Prefixes differ from their first word on."""
    rng = random.Random(seed)
    words = ["river", "stone", "candle", "window", "garden", "letter", "market", "winter", "bridge", "silver"]
    prefixes = []
    for number in range(setting.prefixes):
        text = f"Rules of house {number}: " + " ".join(rng.choice(words) for _ in range(_PREFIX_BYTES // 5))
        prefixes.append(text[:_PREFIX_BYTES])
    common = ("The same for every house. " * 400)[: setting.common]
    return [_chat(common + rng.choice(prefixes), f"question {number} ".ljust(_QUESTION_BYTES, "?")) for number in range(setting.requests)]


def _chat(system: str, user: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return {"model": "shared", "messages": messages, "max_tokens": 4}


@contextlib.contextmanager
def serving(setting: Setting, folder: Path) -> Iterator[list[str]]:
    """Addresses of the servers."""
    model = write_model(folder / "shared", num_cache_blocks=setting.blocks, prompt_token_us=setting.token_us)
    command = [sys.executable, "-m", "tests.runtime.server_fakes", str(model), "--port=0", "--log-format=json", "--drain-delay=0"]
    command += ["--max-batch-size=8", f"--block-size={_BLOCK}"]
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(_process(command)) for _ in range(setting.replicas)]
        yield [_wait(process, "ready")["url"] for process in started]


@contextlib.contextmanager
def gateway(urls: Sequence[str], folder: Path) -> Iterator[str]:
    """The address of a gateway before the servers."""
    services = folder / "services.json"
    services.write_text(json.dumps({"services": [{"name": "shared", "replicas": list(urls)}]}))
    command = [sys.executable, "-m", "gantline_gateway.main", "--host=127.0.0.1", "--port=0", "--internal-port=0", "--log-format=json"]
    with _process([*command, f"--services={services}", "--drain-delay=0", "--log-level=info"]) as process:
        yield _wait(process, "listening")["url"]


@contextlib.contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed below; a pipe that nobody reads would stop the process)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log, text=True)
    process.log = log  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        log.close()


def _wait(process: subprocess.Popen[str], message: str, timeout_s: float = 120.0) -> dict[str, Any]:
    """The log line with `message`, once it is there."""
    log, deadline = process.log, time.monotonic() + timeout_s  # type: ignore[attr-defined]
    while time.monotonic() < deadline and process.poll() is None:
        log.seek(0)
        for line in log:
            if line.startswith("{") and json.loads(line)["message"] == message:
                return json.loads(line)  # type: ignore[no-any-return]
        time.sleep(0.05)
    log.seek(0)
    raise RuntimeError(f"{process.args!r} never said {message!r}:\n{log.read()[-2000:]}")


async def send(requests: Sequence[dict[str, Any]], pick: Callable[[], str], clients: int) -> Outcome:
    """Send all to the addresses that `pick` gives, `clients` at a time."""
    waiting, total, cached = iter(requests), 0, 0

    async def work(client: httpx.AsyncClient) -> None:
        nonlocal total, cached
        for body in waiting:
            answer = await client.post(f"{pick()}/v1/chat/completions", json=body)
            answer.raise_for_status()
            usage = answer.json()["usage"]
            total += usage["prompt_tokens"]
            cached += usage["prompt_tokens_details"]["cached_tokens"]

    began = time.monotonic()
    async with _client(clients) as client:
        await asyncio.gather(*(work(client) for _ in range(clients)))
    seconds = time.monotonic() - began
    return Outcome(cached / total, len(requests) / seconds, total / seconds)


def turns(urls: Sequence[str]) -> Callable[[], str]:
    """Each address after the other."""
    return itertools.cycle(urls).__next__


@contextlib.asynccontextmanager
async def _client(clients: int) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        yield client


def _busiest(urls: Sequence[str]) -> float:
    name = "gantline_request_success_total"
    pages = [httpx.get(f"{url}/metrics", timeout=60).text.splitlines() for url in urls]
    counts = [sum(float(line.split()[-1]) for line in page if line.startswith(name)) for page in pages]
    return max(counts) / sum(counts)


def compare(setting: Setting) -> tuple[Outcome, Outcome]:
    """(through the gateway, in turns), each on servers of its own, one after the other."""
    requests = make_requests(setting)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(setting, folder) as urls, gateway(urls, folder) as url:
            routed = asyncio.run(send(requests, lambda: url, setting.clients))
            routed = replace(routed, busiest=_busiest(urls))
        with serving(setting, folder) as urls:
            in_turns = asyncio.run(send(requests, turns(urls), setting.clients))
            in_turns = replace(in_turns, busiest=_busiest(urls))
    return routed, in_turns


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Setting()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    parser.add_argument("--must", type=float, default=1.5)
    options = vars(parser.parse_args())
    must = options.pop("must")
    setting = Setting(**options)
    routed, in_turns = compare(setting)
    print(json.dumps(asdict(setting)))
    for name, outcome in (("gateway", routed), ("in turns", in_turns)):
        print(name, json.dumps({key: round(value, 3) for key, value in asdict(outcome).items()}))
    ratio = routed.hit_rate / in_turns.hit_rate
    print(f"hit rate x {ratio:.2f}, requests a second x {routed.requests_per_s / in_turns.requests_per_s:.2f}")
    return int(ratio < must)


if __name__ == "__main__":
    sys.exit(main())
