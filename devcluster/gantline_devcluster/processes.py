"""The owner's side of keeper.py: start and stop components, learn what became of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gantline_devcluster import keeper
from gantline_devcluster.errors import DevclusterError

TAIL_BYTES = 4096


@dataclass(frozen=True)
class Component:
    """A program of the cluster: its command, and where its output goes."""

    name: str
    argv: list[str]
    log: Path
    restart: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    end_signal: int = signal.SIGTERM  # what ends it when everything ends; SIGKILL where nothing is worth saving

    def to_order(self) -> dict[str, Any]:
        return {
            "do": "start", "name": self.name, "argv": [str(a) for a in self.argv], "log": str(self.log), "restart": self.restart,
            "env": {**_inherited(), **self.environment}, "end_signal": int(self.end_signal),
        }  # fmt: skip


def _inherited() -> dict[str, str]:
    """What components see of the user's environment: no proxies (all addresses are local), no KUBECONFIG of another cluster."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}


@dataclass
class State:
    """What the keeper last said of a component; `code` is its latest exit code, `restarts` how often it was started again."""

    pid: int | None = None
    code: int | None = None
    starts: int = 0
    again: bool = False

    @property
    def running(self) -> bool:
        return self.pid is not None

    @property
    def failed(self) -> bool:
        return not self.running and not self.again and self.starts > 0


class Keeper:
    """A keeper process and its components. Ending this process in any way, SIGKILL included, ends them all."""

    def __init__(self, command: list[str] | None = None, *, remove_at_end: Path | None = None, log: Path | None = None) -> None:
        """`command` runs keeper.py (default: this interpreter, isolated and without site, for a quick start); its own errors go into `log`.

        The folder `remove_at_end` goes with the keeper.
        """
        argv = command or [sys.executable, "-IS", str(Path(keeper.__file__))]
        with log.open("ab") if log else contextlib.nullcontext() as errors:
            self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        self._changed = threading.Condition()
        self.states: dict[str, State] = {}
        self._reader = threading.Thread(target=self._read, name="keeper-events", daemon=True)
        self._reader.start()
        if remove_at_end:
            self._send({"do": "remove", "path": str(remove_at_end)})

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, component: Component) -> None:
        with self._changed:
            self.states.setdefault(component.name, State()).again = True
        self._send(component.to_order())

    def stop(self, name: str, number: int = signal.SIGTERM, timeout_s: float = 15.0) -> None:
        """Signal a component and wait until it is gone. Raises DevclusterError if it is not within `timeout_s`."""
        self._send({"do": "stop", "name": name, "signal": int(number)})
        with self._changed:
            if not self._changed.wait_for(lambda: not self.states[name].running, timeout_s):
                raise DevclusterError(f"{name} did not stop within {timeout_s:.0f} s", "End it by its process id")

    def wait_running(self, name: str, timeout_s: float = 15.0) -> None:
        """Wait until a component has been started. Raises DevclusterError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.states[name].starts > 0 or not self.alive(), timeout_s) or not self.alive():
                raise DevclusterError(f"{name} could not be started", "Look into the log of the keeper process")

    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self, timeout_s: float = 15.0) -> None:
        """Stop everything, latest first; returns when all of it is gone."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout_s)

    def _send(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise DevclusterError("the cluster's keeper process is gone", "Start the cluster again") from error

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith(b"{"):
                continue
            event = json.loads(line)
            with self._changed:
                state = self.states.setdefault(event["name"], State())
                if event["event"] == "started":
                    state.pid, state.starts, state.again = event["pid"], state.starts + 1, False
                else:
                    state.pid, state.code, state.again = None, event["code"], event["again_in_s"] is not None
                    state.starts = max(state.starts, 1)
                self._changed.notify_all()
        self._process.wait()
        with self._changed:
            self._changed.notify_all()


def tail(log: Path) -> str:
    """The end of a log, for an error message; the last line that says error or fatal where there is one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "no log"
    telling = [line for line in lines if "rror" in line or "atal" in line or "panic" in line or line.startswith("E")]
    return (telling or lines or ["no output"])[-1][:400]
