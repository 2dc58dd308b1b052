"""Python programs that begin where their imports end: each is a fork of a process that has imported what is slow to import.

A test that starts a server pays for the fork alone, instead of most of a second. The program is run as `python -m` or `python -c` runs
it: with its own environment, folder, arguments and outputs, in a process of its own, whose end has the same exit code. Name a module in
`preload` only where importing it reads nothing of the environment and starts nothing.

    test  --order and outputs over a socket-->  nursery  --fork-->  program
    test  <--process id, later the exit code--  nursery  <--ends--  program
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
_LARGEST_ORDER = 200_000  # bytes: the arguments and the environment
_nurseries: dict[tuple[str, ...], _Nursery] = {}
_starting = threading.Lock()


class WarmProcess:
    """What tests use of `subprocess.Popen`. Not its child, so its processor time is the nursery's."""

    def __init__(self, pid: int, code: int, stdout: TextIO, stderr: TextIO) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._code = code
        self._reading = threading.Lock()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        with self._reading:
            if self.returncode is None:
                poll = select.poll()
                poll.register(self._code, select.POLLIN)
                if not poll.poll(None if timeout is None else timeout * 1000):
                    raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
                self.returncode = int(os.read(self._code, 16) or -signal.SIGKILL)  # nothing: the nursery itself is gone
                os.close(self._code)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(arguments: Sequence[str], environment: Mapping[str, str], *, preload: tuple[str, ...], cwd: Path = ROOT) -> WarmProcess:
    """What `subprocess.Popen([sys.executable, *arguments], ...)` starts, `arguments` being `-m MODULE ...` or `-c CODE ...`.

    Its stdin is empty, its stdout and stderr are text that the caller must read.
    """
    assert arguments[0] in ("-m", "-c"), arguments
    with _starting:
        if preload not in _nurseries:
            _nurseries[preload] = _Nursery(preload)
        return _nurseries[preload].start(arguments, environment, cwd)


def run(
    arguments: Sequence[str], environment: Mapping[str, str], *, preload: tuple[str, ...], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with `capture_output` and `text`. Raises subprocess.TimeoutExpired."""
    process = start(arguments, environment, preload=preload)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(process.stdout.read()))
    reader.start()
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    with process.stdout, process.stderr:
        errors = process.stderr.read()
        reader.join()
        code = process.wait()
    in_time = timer.is_alive()
    timer.cancel()
    if not in_time:
        raise subprocess.TimeoutExpired(list(arguments), timeout_s, said[0], errors)
    return subprocess.CompletedProcess(list(arguments), code, said[0], errors)


class _Nursery:
    def __init__(self, preload: tuple[str, ...]) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for option, end in ((socket.SO_SNDBUF, self._channel), (socket.SO_RCVBUF, theirs)):
            end.setsockopt(socket.SOL_SOCKET, option, 2 * _LARGEST_ORDER)
        places = (str(ROOT), str(ROOT / "runtime"), os.environ.get("PYTHONPATH", ""))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))}
        command = [sys.executable, "-m", "tests.warm", str(theirs.fileno()), *preload]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()
        atexit.register(self._end)

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path) -> WarmProcess:
        (out, out_end), (err, err_end), (code, code_end) = os.pipe(), os.pipe(), os.pipe()
        order = {
            "arguments": arguments,
            "environment": dict(environment),
            "cwd": str(cwd),
            "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        }
        message = json.dumps(order).encode()
        assert len(message) < _LARGEST_ORDER, "the order is too large"
        socket.send_fds(self._channel, [message], [out_end, err_end, code_end])
        for end in (out_end, err_end, code_end):
            os.close(end)
        answer = self._channel.recv(16)
        assert answer, f"the process that has imported ended: {self._process.wait()}"
        return WarmProcess(int(answer), code, open(out, errors="replace"), open(err, errors="replace"))

    def _end(self) -> None:
        self._channel.close()
        self._process.wait()


# ---- in the nursery


def main(channel: socket.socket, preload: Sequence[str]) -> None:
    """Import, then fork for each order until the test's process is gone. Never has a thread, or a fork could not be trusted."""
    for name in preload:
        importlib.import_module(name)
    assert threading.active_count() == 1, "an import has started a thread"
    gc.collect()
    gc.freeze()
    running: dict[int, tuple[int, int]] = {}  # pidfd -> (process id, where its exit code goes)
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not channel:
                    handle = key.fd
                    pid, code = running.pop(handle)
                    selector.unregister(handle)
                    os.close(handle)
                    with os.fdopen(code, "w") as file, contextlib.suppress(BrokenPipeError):
                        file.write(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                    continue
                message, ends, _, _ = socket.recv_fds(channel, _LARGEST_ORDER, 3)
                if not message:
                    return
                pid = os.fork()
                if not pid:
                    for opened in (channel.fileno(), selector.fileno(), ends[2], *running, *(end for _, end in running.values())):  # type: ignore[attr-defined]
                        os.close(opened)
                    _become(json.loads(message), ends[0], ends[1])
                os.close(ends[0])
                os.close(ends[1])
                handle = os.pidfd_open(pid)
                running[handle] = pid, ends[2]
                selector.register(handle, selectors.EVENT_READ)
                channel.send(str(pid).encode())


def _become(order: dict[str, Any], out: int, err: int) -> None:
    """Run the program as the interpreter would, and end this process with its exit code."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    resource.setrlimit(resource.RLIMIT_NOFILE, tuple(order["files"]))
    os.environ.clear()
    os.environ.update(order["environment"])
    tempfile.tempdir = None  # as found in another environment
    os.chdir(order["cwd"])
    code: object = 0
    try:
        kind, program, *rest = order["arguments"]
        sys.argv = [kind, *rest]
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]) | {"__name__": "__main__", "__file__": None})
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
