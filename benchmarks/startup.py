"""Seconds from the exec of `gantline serve` to the first streamed byte: `python -m benchmarks.startup --model DIR [--repeats 3]`.

The checkpoint's files are read once beforehand, so they lie in the page cache; kernel caches are as the caller left them (--cold empties
Triton's).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

_LIMIT_S = 300.0


def first_byte_s(model: Path, extra: list[str], environment: dict[str, str]) -> float:
    """Start the server, ask as soon as it is ready, and stop it. Raises RuntimeError if it ends or answers nothing in time."""
    port = _free_port()
    command = [sys.executable, "-m", "gantline_runtime.cli", "serve", str(model), f"--port={port}", "--drain-delay=0", *extra]
    started = time.monotonic()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            while not _ready(port):
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with exit code {process.returncode} before it was ready")
                if time.monotonic() - started > _LIMIT_S:
                    raise RuntimeError(f"not ready within {_LIMIT_S} s")
                time.sleep(0.02)
            _first_event(port)
            return time.monotonic() - started
        finally:
            process.send_signal(signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _first_event(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as answer:
        name = json.load(answer)["data"][0]["id"]
    body = {"model": name, "prompt": "t1 t2 t3", "max_tokens": 2, "stream": True, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as stream:
        if not stream.readline().startswith(b"data: {"):
            raise RuntimeError("the first line of the stream was no event")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="give each run an empty Triton cache")
    options, extra = parser.parse_known_args()
    for file in options.model.glob("*.safetensors"):
        file.read_bytes()
    seconds = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as empty:
            environment = {**os.environ, **({"TRITON_CACHE_DIR": empty} if options.cold else {})}
            seconds.append(first_byte_s(options.model, extra, environment))
    print(json.dumps({"start_s": round(statistics.median(seconds), 2), "runs": [round(s, 2) for s in seconds], "cold": options.cold}))


if __name__ == "__main__":
    main()
