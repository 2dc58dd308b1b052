"""What the gateway adds: `python -m benchmarks.gateway [--requests 3000] [--clients 64] [--seconds 8]`, beside direct connections.

Behind it is a replica that answers at once and does nothing else, so that what is measured is the gateway. Printed, as JSON:

latency     milliseconds of a chat request, direct and through the gateway in turns, one at a time: p50, p99, and their differences
requests    requests a second of so many clients, and the gateway's processor time for one of them
stream      events a second of so many streams (one token each, at a fixed rate), and the gateway's processor time for one of them
clients     with --compare-clients: the same request by three HTTP client libraries, milliseconds and processor time

With --tls the gateway's port speaks HTTPS (and `openssl` makes it a certificate); direct connections stay plain.

Rates are also given for a whole core, from the processor time: a machine that does other things as well changes that little.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_TICKS = os.sysconf("SC_CLK_TCK")
_ANSWER = json.dumps(
    {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": "m",
     "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello! " * 8}, "finish_reason": "stop"}],
     "usage": {"prompt_tokens": 20, "completion_tokens": 16, "total_tokens": 36}}
).encode()  # fmt: skip
_EVENT = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":0,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'
)
_CHUNK = b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT)
_END = b"data: [DONE]\n\n: gantline-usage 20,200,0\n\n"
_EVENTS_A_STREAM = 200
_QUESTION = {"model": "m", "messages": [{"role": "system", "content": "Be brief. " * 30}, {"role": "user", "content": "Hello?"}]}


class _Replica(asyncio.Protocol):
    """The least that can be called an OpenAI server."""

    period_s = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport, self._buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        lower = head.lower()
        if not found or len(body) < int(lower.partition(b"content-length:")[2].split(b"\r\n")[0]):
            return
        self._buffer = b""
        if b'"stream":true' in body.replace(b" ", b""):
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            self._next(_EVENTS_A_STREAM)
        else:
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Gantline-Usage: 20,16,0\r\nContent-Length: %d\r\n\r\n"
            self._transport.write(head % len(_ANSWER) + _ANSWER)

    def _next(self, left: int) -> None:
        if self._transport.is_closing():
            return
        if left:
            self._transport.write(_CHUNK)
            asyncio.get_running_loop().call_later(self.period_s, self._next, left - 1)
        else:
            self._transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(_END), _END))


async def _replica(events_per_second: float) -> None:
    _Replica.period_s = 1 / events_per_second
    server = await asyncio.get_running_loop().create_server(_Replica, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@dataclass(frozen=True)
class _Endpoint:
    port: int
    tls: ssl.SSLContext | None = None


class _Client:
    """One keep-alive connection; written by hand, so that it costs less than what it measures."""

    def __init__(self, endpoint: _Endpoint) -> None:
        self._endpoint = endpoint

    async def __aenter__(self) -> _Client:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._endpoint.port, ssl=self._endpoint.tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self, stream: bool, count: Callable[[int], None] = lambda events: None) -> None:
        body = json.dumps({**_QUESTION, "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        if not stream:
            answer = await self._reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in answer[:20]:
                raise RuntimeError(answer.decode())
            await self._reader.readexactly(int(answer.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
            return
        tail = b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await self._reader.read(1 << 16)
            if not data:
                raise RuntimeError("the connection was closed")
            count(data.count(b'"delta"'))
            tail = (tail + data)[-16:]


async def _latency(endpoints: dict[str, _Endpoint], requests: int) -> dict[str, Any]:
    """In turns, so that whatever else the machine does meets both."""
    times: dict[str, list[float]] = {name: [] for name in endpoints}
    async with contextlib.AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(_Client(endpoint)) for name, endpoint in endpoints.items()}
        for turn in range(requests + 100):
            for name, client in clients.items():
                began = time.perf_counter()
                await client.ask(False)
                if turn >= 100:
                    times[name].append((time.perf_counter() - began) * 1e3)
    found = {name: _percentiles(values) for name, values in times.items()}
    added = {key: round(found["gateway"][key] - found["direct"][key], 3) for key in ("p50_ms", "p99_ms")}
    return {**found, "added": added}


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p50_ms": round(cuts[49], 3), "p99_ms": round(cuts[98], 3)}


async def _load(endpoint: _Endpoint, clients: int, seconds: float, stream: bool, cpu: Callable[[], float]) -> dict[str, Any]:
    done, events, stop = 0, 0, False

    def count(found: int) -> None:
        nonlocal events
        events += found

    async def ask_on() -> None:
        nonlocal done
        async with _Client(endpoint) as client:
            while not stop:
                await client.ask(stream, count)
                done += 1

    tasks = [asyncio.create_task(ask_on()) for _ in range(clients)]
    await asyncio.sleep(2)
    before, used, began = (events if stream else done), cpu(), time.perf_counter()
    failed, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in failed:
        task.result()
    elapsed, used = time.perf_counter() - began, cpu() - used
    number = (events if stream else done) - before
    stop = True
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    found = {"clients": clients, "per_second": round(number / elapsed)}
    return found | ({"cpu_us_each": round(1e6 * used / number, 1), "per_second_and_core": round(number / used)} if used else {})


async def _compare_clients(port: int, requests: int) -> dict[str, Any]:
    """The same request, one at a time on a kept connection."""
    import aiohttp
    import httpcore
    import httpx

    url, body = f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(_QUESTION).encode()
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession() as session, httpx.AsyncClient() as client, httpcore.AsyncConnectionPool() as pool:

        async def by_aiohttp() -> None:
            async with session.post(url, data=body, headers=headers) as answer:
                await answer.read()

        async def by_httpx() -> None:
            await client.post(url, content=body, headers=headers)

        async def by_httpcore() -> None:
            await pool.request("POST", url, content=body, headers=headers)

        return {work.__name__[3:]: await _timed(work, requests) for work in (by_aiohttp, by_httpx, by_httpcore)}


async def _timed(work: Callable[[], Awaitable[None]], requests: int) -> dict[str, float]:
    for _ in range(50):
        await work()
    times, used = [], time.process_time()
    for _ in range(requests):
        began = time.perf_counter()
        await work()
        times.append((time.perf_counter() - began) * 1e3)
    return {**_percentiles(times), "cpu_us_each": round((time.process_time() - used) / requests * 1e6, 1)}


@contextlib.contextmanager
def _process(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        replica = stack.enter_context(
            _process(["-m", "benchmarks.gateway", "replica", str(options.events_per_second)], stdout=subprocess.PIPE)
        )
        assert replica.stdout is not None
        direct = int(replica.stdout.readline())
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "services.json"
        file.write_text(json.dumps({"services": [{"name": "m", "replicas": [f"http://127.0.0.1:{direct}"]}]}))
        flags = [f"--services={file}", "--host=127.0.0.1", "--port=0", "--internal-port=0", "--drain-delay=0", "--drain-timeout=0"]
        log = stack.enter_context((file.parent / "log").open("w"))
        certificate = _certificate(file.parent) if options.tls else None
        flags += [f"--tls-cert={certificate}", f"--tls-key={file.parent / 'key.pem'}"] if certificate else []
        gateway = stack.enter_context(_process(["-m", "gantline_gateway.main", *flags, "--log-format=json"], stderr=log))
        context = ssl.create_default_context(cafile=str(certificate)) if certificate else None
        replica_end, gateway_end = _Endpoint(direct), _Endpoint(_port(file.parent / "log"), context)

        def cpu() -> float:
            return _cpu_seconds(gateway.pid)

        found = {"latency": asyncio.run(_latency({"direct": replica_end, "gateway": gateway_end}, options.requests))}
        for name, stream in (("requests", False), ("stream", True)):
            straight = asyncio.run(_load(replica_end, options.clients, options.seconds, stream, lambda: 0.0))
            through = asyncio.run(_load(gateway_end, options.clients, options.seconds, stream, cpu))
            found[name] = {"direct": straight, "gateway": through}
        if options.compare_clients:
            found["clients"] = asyncio.run(_compare_clients(direct, options.requests))
        found["gateway_mib"] = round(int(Path(f"/proc/{gateway.pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
        return found


def _certificate(folder: Path) -> Path:
    """Of 127.0.0.1, its own authority; `key.pem` beside it is its key."""
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x", "-days", "2"]
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*new, *files], check=True, capture_output=True)
    return folder / "cert.pem"


def _port(log: Path, timeout_s: float = 30.0) -> int:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if '"listening"' in line:
                return int(json.loads(line)["url"].rpartition(":")[2])
        time.sleep(0.05)
    raise RuntimeError(f"the gateway does not listen: {log.read_text()}")


def main() -> None:
    if sys.argv[1:2] == ["replica"]:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_replica(float(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000, help="for the latencies")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--events-per-second", type=float, default=50.0, help="of one stream")
    parser.add_argument("--compare-clients", action="store_true")
    parser.add_argument("--tls", action="store_true", help="HTTPS at the gateway")
    print(json.dumps(_measure(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
