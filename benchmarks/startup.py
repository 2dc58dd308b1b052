"""Seconds from the exec of `gantline serve` to the first streamed byte: `python -m benchmarks.startup --model DIR [--repeats 3]`.

The checkpoint's files are read once beforehand, so they lie in the page cache; kernel caches are as the caller left them (--cold empties
Triton's). `kernels` says where the last run's Triton kernels came from, as `gantline_triton_kernels_total` does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.http_load import served_name
from benchmarks.serving import running_server

_REPORT_S = 1.5
"""The engine tells its counts twice a second."""


def first_byte_s(model: Path, extra: list[str], environment: dict[str, str]) -> tuple[float, dict[str, int]]:
    """Start the server, ask as soon as it is ready, and stop it -> (seconds, Triton kernels by where they came from).

    Raises RuntimeError if it ends or answers nothing in time.
    """
    started = time.monotonic()
    with running_server(model, extra, environment) as port:
        _first_event(port)
        seconds = time.monotonic() - started
        time.sleep(_REPORT_S)
        return seconds, _loaded_kernels(port)


def _loaded_kernels(port: int) -> dict[str, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found = re.findall(r'^gantline_triton_kernels_total{source="(\w+)"} (\d+)', answer.read().decode(), re.M)
    return {source: int(count) for source, count in found}


def _first_event(port: int) -> None:
    body = {"model": served_name(port), "prompt": "t1 t2 t3", "max_tokens": 2, "stream": True, "ignore_eos": True}
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
    seconds, kernels = [], {}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as empty:
            environment = {**os.environ, **({"TRITON_CACHE_DIR": empty} if options.cold else {})}
            taken, kernels = first_byte_s(options.model, extra, environment)
            seconds.append(taken)
    runs = [round(s, 2) for s in seconds]
    print(json.dumps({"start_s": round(statistics.median(seconds), 2), "runs": runs, "cold": options.cold, "kernels": kernels}))


if __name__ == "__main__":
    main()
