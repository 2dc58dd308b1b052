"""Starts `gantline serve` as a user does, in a process of its own, and asks it over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
ECHO = ("-m", "tests.runtime.server_fakes")
"""`gantline serve` with an engine that repeats the last message."""
REAL = ("-m", "gantline_runtime.cli", "serve")
TRUSTS_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients that ask over HTTP alone: reading whom the world trusts takes 24 ms."""
_LIBRARIES = ("numpy", "pydantic.main", "starlette.applications", "tokenizers", "uvicorn", "uvloop", "yaml", "zmq.asyncio")
PRELOAD = (*_LIBRARIES, "gantline_runtime.cli", "gantline_runtime.commands.serving", "gantline_runtime.server.runner")
PRELOAD_OF_SEVERAL = (*_LIBRARIES, "gantline_runtime.cli", "gantline_runtime.commands.serving")
"""Of a server of several API processes: it chooses how it counts before it imports what counts."""


class LoggedProcess:
    """A program that logs JSON lines on stderr and answers HTTP at `url`, once that is known."""

    def __init__(self, arguments: Sequence[str], preload: tuple[str, ...] | None, environment: Mapping[str, str] | None = None) -> None:
        """`arguments` of Python; see tests/warm.py for `preload`. None: a process that imports everything itself."""
        self.termination_path = Path(tempfile.mkdtemp(prefix="gantline-test-")) / "termination-log"
        own = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "runtime"))), "GANTLINE_TERMINATION_LOG": str(self.termination_path)}
        whole = {**os.environ, "OMP_NUM_THREADS": "1", **own, **(environment or {})}
        self.process: warm.WarmProcess | subprocess.Popen[str]
        if preload is None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen([sys.executable, *arguments], stdout=pipe, stderr=pipe, cwd=ROOT, env=whole, text=True)
        else:
            self.process = warm.start(arguments, whole, preload=preload)
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""
        self._client = httpx.Client(timeout=60, verify=TRUSTS_NOBODY)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def logs(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def wait_log(self, message: str, timeout_s: float = 60.0) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            return next((line for line in self.logs if line["message"] == message), None)

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or self._ended, timeout_s)
        line = found()
        assert line is not None, f"no log line {message!r} in:\n" + "\n".join(self.lines)
        return line

    def wait_exit(self, timeout_s: float = 60.0) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        return code

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.terminate()
            try:
                return self.wait_exit(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.wait_exit()

    @property
    def termination(self) -> dict[str, Any]:
        return json.loads(self.termination_path.read_text())  # type: ignore[no-any-return]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=self._client)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self._client.get(self.url + path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self._client.post(self.url + path, json=body, **options)

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._client.request(method, self.url + path, **options)

    def metric(self, name: str, **labels: str) -> float:
        return read_metric(self.get("/metrics").text, name, **labels)


class ServerProcess(LoggedProcess):
    """A server and its log. `flags` are those of `gantline serve`. `imports`: it imports everything itself, as a user's does."""

    def __init__(self, model_dir: Path, *flags: str, program: tuple[str, ...] = ECHO, imports: bool = False) -> None:
        several = any(flag.startswith("--api-workers") for flag in flags)
        preload = None if imports else PRELOAD_OF_SEVERAL if several else PRELOAD
        super().__init__([*program, str(model_dir), "--port=0", "--log-format=json", *flags], preload)

    def wait_listening(self) -> ServerProcess:
        self.url = self.wait_log("listening")["url"]
        return self

    def wait_ready(self) -> ServerProcess:
        self.wait_listening()
        self.wait_log("ready")
        return self

    @property
    def engine_pid(self) -> int:
        """The child that runs `gantline_runtime.engine_process`."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            if b"gantline_runtime.engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        raise AssertionError("there is no engine process")


@contextlib.contextmanager
def few_files(count: int) -> Iterator[None]:
    """What is started inside of the block begins with room for `count` open files, though more are allowed."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def read_all(client: socket.socket) -> bytes:
    """Until the other side closes."""
    answer = b""
    while piece := client.recv(65536):
        answer += piece
    return answer


def events(text: str) -> list[dict[str, Any]]:
    """The bodies of a stream's events, without the last word."""
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]


def read_metric(text: str, name: str, default: float | None = None, **labels: str) -> float:
    """The value of a series; `default` for one that is not there yet, as those with labels before they first happen."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    for line in text.splitlines():
        if line.split("{")[0].split(" ")[0] == name and all(label in line for label in wanted):
            return float(line.rsplit(" ", 1)[1])
    assert default is not None, f"no metric {name} {labels}"
    return default


@contextlib.contextmanager
def running(model_dir: Path, *flags: str, program: tuple[str, ...] = ECHO, imports: bool = False) -> Iterator[ServerProcess]:
    """A server that is ready; it is stopped afterwards."""
    server = ServerProcess(model_dir, *flags, program=program, imports=imports)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0, what: str = "the condition") -> float:
    """Seconds until `condition` held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"{what} did not come true within {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - began
