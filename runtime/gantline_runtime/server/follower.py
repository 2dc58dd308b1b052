"""A further API process (`--api-workers`): the same port, the same engine, and a life that the first one leads.

python -m gantline_runtime.server.follower '{"number": 1, ...}'      (FollowerSettings as JSON)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop
import zmq
import zmq.asyncio

from gantline_runtime import garbage, logs
from gantline_runtime.child_process import become_child
from gantline_runtime.config import EngineConfig, ServerConfig, from_mapping
from gantline_runtime.engine_client import EngineClient, EngineUnavailable
from gantline_runtime.engine_messages import EngineProgress
from gantline_runtime.failures import describe_exception
from gantline_runtime.server.front import Front
from gantline_runtime.server.lifecycle import Lifecycle, State
from gantline_runtime.server.loading import load_model
from gantline_runtime.server.metrics import Metrics
from gantline_runtime.server.service import Service
from gantline_runtime.server.worker_messages import CutOff, Die, Drain, FollowerSettings, Order, Serve, Stop, WorkerReport
from gantline_runtime.termination import Reason, TerminationMessage, exit_code

__all__ = ["Follower", "main"]

_REPORT_S = 1.0
_DRAIN_REPORT_S = 0.05
"""While draining the first process waits for the last request to end."""


class Follower:
    def __init__(self, settings: FollowerSettings) -> None:
        """Listens at once. Raises ConfigurationError."""
        self._settings = settings
        config = from_mapping(ServerConfig, settings.server_config)
        self._lifecycle = Lifecycle()
        self._metrics = Metrics(settings.version)
        self._service = Service(from_mapping(EngineConfig, settings.engine_config), config, self._lifecycle, self._metrics)
        self._engine = EngineClient(on_report=self._metrics.engine, on_prefixes=self._service.prefixes.apply)
        self._service.engine = self._engine
        self._front = Front(self._service, config, version=settings.version)
        self._decoder = msgspec.msgpack.Decoder(Order)
        self._last_order = 0
        self._loaded = False
        self._stopped = False

    async def run(self) -> None:
        """Until told to stop."""
        context = zmq.asyncio.Context()
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.IDENTITY, f"worker-{self._settings.number}".encode())
        self._socket.connect(self._settings.control_endpoint)
        self._engine.connect(self._settings.engine_endpoint)
        tasks = [asyncio.create_task(self._load()), asyncio.create_task(self._report_often())]
        try:
            async with self._front.serving():
                self._report()
                while not self._stopped:
                    order = self._decoder.decode(await self._socket.recv())
                    self._follow(order)
                    self._report()
                    if tasks[0].done():
                        tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._engine.close()
            await self._service.close()
            self._socket.close()
            context.term()

    async def _load(self) -> None:
        await load_model(self._service, Path(self._settings.model_dir))
        ready = await self._engine.ready
        self._service.session_len, self._service.eos_token_ids = ready.session_len, frozenset(ready.eos_token_ids)
        self._loaded = True
        self._report()

    def _follow(self, order: Order) -> None:
        self._last_order = order.number
        match order.what:
            case EngineProgress(phase=phase, done=done, total=total):
                self._lifecycle.show_progress(phase, done, total)
            case Serve(startup=startup):
                for phase, seconds in startup.items():
                    self._metrics.startup(phase, seconds)
                garbage.settle()
                self._lifecycle.enter(State.READY)
            case Drain(delay_s=delay_s):
                self._lifecycle.drain(delay_s)
            case CutOff():
                self._engine.fail_all(EngineUnavailable("the server is shutting down", Reason.DRAINED))
                self._front.cut_off()
            case Die(reason=reason, message=message):
                self._lifecycle.enter(State.DEAD)
                self._engine.declare_dead(TerminationMessage(Reason(reason), message))
                self._front.cut_off()
            case Stop():
                self._stopped = True

    def _report(self) -> None:
        self._socket.send(msgspec.msgpack.encode(WorkerReport(self._last_order, self._service.num_admitted, self._loaded)))

    async def _report_often(self) -> None:
        while True:
            await asyncio.sleep(_DRAIN_REPORT_S if self._lifecycle.state is State.DRAINING else _REPORT_S)
            self._report()


def main(arguments: Sequence[str]) -> int:
    settings = msgspec.json.decode(arguments[0], type=FollowerSettings)
    become_child(settings.parent_pid)
    logs.configure(str(settings.server_config["log_level"]), settings.log_format)

    async def run() -> None:
        await Follower(settings).run()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            loop.run(run())
    except Exception as error:
        logging.getLogger("gantline.server").exception("an API worker failed", extra=logs.fields(worker=settings.number))
        return exit_code(describe_exception(error).reason)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)
