"""The process that keeps a cluster's components: it starts them, restarts them, and takes them with it, however its owner ends.

Runs by itself (`python -IS keeper.py`, standard library only, one thread) and speaks JSON lines. In on stdin:

    {"do": "start", "name", "argv", "log", "env", "restart"}   {"do": "stop", "name", "signal"}   {"do": "remove", "path"}

out on stdout: `{"event": "started", "name", "pid"}`, `{"event": "exited", "name", "code", "again_in_s"}`. When stdin ends (the owner
closed it, exited or was killed) everything is stopped, latest first, and the paths given to `remove` are deleted. Each component asks the
kernel for SIGKILL should the keeper itself be killed (PR_SET_PDEATHSIG is tied to the *thread* that forks, which is why this is a process
of its own and not a thread of a test's).
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
FIRST_DELAY_S, LONGEST_DELAY_S, HEALTHY_AFTER_S = 0.5, 10.0, 30.0
GRACE_S = 3.0
_libc = ctypes.CDLL(None, use_errno=True)


class Component:
    """One started program and what is known about it."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.restart_at: float | None = None
        self.delay_s = FIRST_DELAY_S
        self.stopping = False

    def start(self) -> int:
        with open(self.order["log"], "ab") as log:
            self.process = subprocess.Popen(
                self.order["argv"], env=self.order["env"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                cwd=self.order.get("cwd"), preexec_fn=lambda: _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
            )  # fmt: skip
        self.started_at = time.monotonic()
        self.restart_at = None
        return self.process.pid

    def exited(self, code: int) -> float | None:
        """Note the exit; returns in how many seconds it will be started again, or None."""
        assert self.process is not None, "a component that never ran cannot exit"
        self.process.returncode, self.process = code, None  # reaped by the keeper itself, so Popen must not try
        if self.stopping or not self.order["restart"]:
            return None
        self.delay_s = FIRST_DELAY_S if time.monotonic() - self.started_at > HEALTHY_AFTER_S else min(self.delay_s * 2, LONGEST_DELAY_S)
        self.restart_at = time.monotonic() + self.delay_s
        return self.delay_s


class Keeper:
    def __init__(self) -> None:
        self.components: dict[str, Component] = {}
        self.removed_at_end: list[str] = []
        self.ending = False

    def run(self) -> None:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        wake_out, wake_in = os.pipe()
        for end in (wake_out, wake_in):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._end)
        selector = selectors.DefaultSelector()
        selector.register(0, selectors.EVENT_READ)
        selector.register(wake_out, selectors.EVENT_READ)
        buffer = b""
        while not self.ending:
            for key, _ in selector.select(self._next_restart_s()):
                data = os.read(key.fd, 65536)
                if key.fd != 0:
                    continue
                if not data:
                    self.ending = True
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    self.obey(json.loads(line))
            self.reap()
            self._restart_what_is_due()
        self.stop_all()

    def obey(self, order: dict[str, Any]) -> None:
        if order["do"] == "start":
            component = self.components[order["name"]] = Component(order)
            self._start(component)
        elif order["do"] == "stop" and order["name"] in self.components:
            component = self.components[order["name"]]
            component.stopping, component.restart_at = True, None
            self._signal(component, order["signal"])
        elif order["do"] == "remove":
            self.removed_at_end.append(order["path"])

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for name, component in self.components.items():
                if component.process and component.process.pid == pid:
                    code = os.waitstatus_to_exitcode(status)
                    tell(event="exited", name=name, code=code, again_in_s=component.exited(code))

    def stop_all(self) -> None:
        running = [c for c in reversed(self.components.values()) if c.process]
        for component in running:
            component.stopping = True
            self._signal(component, component.order.get("end_signal", signal.SIGTERM))
        deadline = time.monotonic() + GRACE_S
        while any(c.process for c in running):
            self.reap()
            if time.monotonic() > deadline:
                for component in running:
                    self._signal(component, signal.SIGKILL)
            time.sleep(0.01)
        for path in self.removed_at_end:
            shutil.rmtree(path, ignore_errors=True)

    def _start(self, component: Component) -> None:
        name = component.order["name"]
        try:
            tell(event="started", name=name, pid=component.start())
        except OSError as error:
            tell(event="exited", name=name, code=127, again_in_s=None, error=str(error))

    def _signal(self, component: Component, number: int) -> None:
        if component.process:
            os.killpg(component.process.pid, number)

    def _next_restart_s(self) -> float | None:
        due = [c.restart_at for c in self.components.values() if c.restart_at is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _restart_what_is_due(self) -> None:
        for component in self.components.values():
            if component.restart_at is not None and component.restart_at <= time.monotonic():
                self._start(component)

    def _end(self, *_: object) -> None:
        self.ending = True


def tell(**event: Any) -> None:
    """One event to the owner; an owner that is gone needs none."""
    try:
        os.write(1, json.dumps(event).encode() + b"\n")
    except BrokenPipeError:
        return


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.dont_write_bytecode = True
    Keeper().run()
