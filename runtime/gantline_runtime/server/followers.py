"""The first API process's side of the others (`--api-workers`): starts them, leads their lives, and notices when one dies or hangs.

All of them are one server: it is ready when all are, drained when all are, and it ends when one dies.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from gantline_runtime import logs
from gantline_runtime.child_process import wait_for_exit
from gantline_runtime.engine_messages import EngineProgress
from gantline_runtime.failures import describe_exit
from gantline_runtime.server.worker_messages import CutOff, Die, Drain, FollowerSettings, Order, Serve, Stop, WorkerReport
from gantline_runtime.termination import Reason, TerminationMessage

__all__ = ["Followers"]

_ACKNOWLEDGE_S = 2.0
_END_S = 5.0
_FIRST_SAYS_WHY_S = 5.0
"""What keeps one process from loading the model keeps the first from it too, and that one can say what it was."""

log = logging.getLogger("gantline.server")


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    heard_at: float
    report: WorkerReport | None = None
    ended: asyncio.Task[int] | None = None


@dataclass
class Followers:
    """`silence_s`: a worker that has not been heard of for so long hangs."""

    silence_s: float
    died: asyncio.Future[TerminationMessage] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Set when one has ended without being told to, or hangs."""
    _workers: dict[bytes, _Worker] = field(default_factory=dict)
    _order: Order = Order(0, EngineProgress(phase="start"))
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _closing: bool = False

    def __post_init__(self) -> None:
        self._changed = asyncio.Event()
        self._decoder = msgspec.msgpack.Decoder(WorkerReport)

    def start(self, settings: Sequence[FollowerSettings]) -> None:
        """Start a process for each of `settings`, whose control endpoints are the same; none: nothing happens."""
        if not settings:
            return
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.bind(settings[0].control_endpoint)
        for one in settings:
            command = [sys.executable, "-P", "-m", "gantline_runtime.server.follower", msgspec.json.encode(one).decode()]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, env=os.environ)
            self._workers[f"worker-{one.number}".encode()] = _Worker(process, time.monotonic())
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch_silence())]
        self._tasks += [asyncio.create_task(self._watch_end(name, worker)) for name, worker in self._workers.items()]

    # ---- what they know

    @property
    def num_admitted(self) -> int:
        return sum(worker.report.num_admitted for worker in self._workers.values() if worker.report is not None)

    async def wait_loaded(self) -> None:
        """Until all could serve. Never, if one cannot: see `died`."""
        await self._wait(lambda report: report is not None and report.loaded)

    async def wait_idle(self) -> None:
        """Until none has a request, as each says after the last order."""
        await self._wait(lambda report: report is None or (report.order >= self._order.number and not report.num_admitted))

    async def tell(self, what: EngineProgress | Serve | Drain | CutOff | Die | Stop) -> None:
        """Have all do something, and wait until they say so, but not for long: one that hangs must not hold the others up."""
        self.post(what)
        number = self._order.number
        try:
            async with asyncio.timeout(_ACKNOWLEDGE_S):
                await self._wait(lambda report: report is None or report.order >= number)
        except TimeoutError:
            log.warning("an API worker does not answer", extra=logs.fields(order=type(what).__name__))

    def post(self, what: EngineProgress | Serve | Drain | CutOff | Die | Stop) -> None:
        """Have all do something, without waiting. Who has not come up yet hears the last order when it does."""
        self._order = Order(self._order.number + 1, what)
        for name, worker in self._workers.items():
            if worker.report is not None:
                self._send(name)

    def _send(self, name: bytes) -> None:
        self._socket.send_multipart([name, msgspec.msgpack.encode(self._order)])

    async def _wait(self, holds: Callable[[WorkerReport | None], bool]) -> None:
        while not all(holds(worker.report) for worker in self._workers.values()):
            self._changed.clear()
            await self._changed.wait()

    # ---- how they fare

    async def _read(self) -> None:
        while True:
            name, data = await self._socket.recv_multipart()
            worker = self._workers[name]
            is_new = worker.report is None
            worker.report, worker.heard_at = self._decoder.decode(data), time.monotonic()
            if is_new and self._order.number:
                self._send(name)
            self._changed.set()

    async def _watch_end(self, name: bytes, worker: _Worker) -> None:
        code = await wait_for_exit(worker.process)
        had_loaded, worker.report = worker.report is not None and worker.report.loaded, None
        self._changed.set()
        if not had_loaded:
            await asyncio.sleep(_FIRST_SAYS_WHY_S)
        if not self._closing:
            self._fail(describe_exit(code, killed_for_memory=False, what=f"the API process {name.decode()}"))

    async def _watch_silence(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for name, worker in self._workers.items():
                silent = time.monotonic() - worker.heard_at
                if worker.report is not None and silent > self.silence_s and not self._closing:
                    text = f"the API process {name.decode()} has not been heard of for {silent:.0f} s"
                    self._fail(TerminationMessage(Reason.INTERNAL_ERROR, text, "See the log for what happened before."))

    def _fail(self, message: TerminationMessage) -> None:
        if not self.died.done():
            self.died.set_result(message)

    async def close(self) -> None:
        """End all: ask, wait a little, then kill."""
        if not self._workers:
            return
        self._closing = True
        self.post(Stop())
        watching = self._tasks[2:]
        await asyncio.wait(watching, timeout=_END_S if all(worker.report for worker in self._workers.values()) else 0.1)
        for worker in self._workers.values():
            if worker.process.poll() is None:
                worker.process.kill()
        for worker in self._workers.values():
            worker.process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._context.term()
