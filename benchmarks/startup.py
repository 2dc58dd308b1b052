"""Seconds from the exec of `gantline serve` to the first streamed byte: `python -m benchmarks.startup --model DIR [--repeats 3]`.

The checkpoint's files are read once beforehand, so they lie in the page cache; kernel caches are as the caller left them (--cold empties
Triton's). `phases` has what the server itself measured of each run (docs/server.md, "Metrics"), and what a client sees: `ask`, from the
first answer of /ready to the first byte. `kernels` says where the last run's Triton kernels came from, as `gantline_triton_kernels_total`
does.
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
from dataclasses import dataclass
from pathlib import Path

from benchmarks.http_load import served_name
from benchmarks.serving import running_server

_REPORT_S = 1.5
"""The engine tells its counts twice a second."""


@dataclass(frozen=True)
class Start:
    """Seconds to the first byte, and of each phase; Triton kernels by where they came from."""

    seconds: float
    phases: dict[str, float]
    kernels: dict[str, int]


def measure_start(model: Path, extra: list[str], environment: dict[str, str]) -> Start:
    """Start the server, ask as soon as it is ready, and stop it. Raises RuntimeError if it ends or answers nothing in time."""
    started = time.monotonic()
    with running_server(model, extra, environment) as port:
        ready = time.monotonic()
        _first_event(port)
        answered = time.monotonic()
        time.sleep(_REPORT_S)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
    phases = {phase: float(seconds) for phase, seconds in re.findall(r'^gantline_startup_seconds{phase="([\w-]+)"} (\S+)', metrics, re.M)}
    kernels = {source: int(count) for source, count in re.findall(r'^gantline_triton_kernels_total{source="(\w+)"} (\d+)', metrics, re.M)}
    return Start(answered - started, {**phases, "ask": answered - ready}, kernels)


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
    starts = list[Start]()
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as empty:
            environment = {**os.environ, **({"TRITON_CACHE_DIR": empty} if options.cold else {})}
            starts.append(measure_start(options.model, extra, environment))
    runs = [round(start.seconds, 2) for start in starts]
    phases = {phase: [round(start.phases.get(phase, 0.0), 2) for start in starts] for phase in starts[-1].phases}
    kernels = starts[-1].kernels
    print(json.dumps({"start_s": statistics.median(runs), "runs": runs, "cold": options.cold, "phases": phases, "kernels": kernels}))


if __name__ == "__main__":
    main()
