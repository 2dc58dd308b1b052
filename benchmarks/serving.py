"""`gantline serve` as a process of its own, for measurements that go through its door."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["running_server"]

_LIMIT_S = 300.0


@contextmanager
def running_server(model: Path, flags: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Iterator[int]:
    """The port of a server that is ready; it is stopped afterwards. Raises RuntimeError if it ends or is not ready in time."""
    port = _free_port()
    command = [sys.executable, "-m", "gantline_runtime.cli", "serve", str(model), f"--port={port}", "--drain-delay=0", *flags]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            _wait_until_ready(process, port)
            yield port
        finally:
            process.send_signal(signal.SIGTERM)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    started = time.monotonic()
    while not _ready(port):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode} before it was ready")
        if time.monotonic() - started > _LIMIT_S:
            raise RuntimeError(f"not ready within {_LIMIT_S} s")
        time.sleep(0.02)


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
