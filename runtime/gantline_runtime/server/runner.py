"""The life of a server process: listen, load, warm up, serve, drain, say why it ended.

bind ──> engine process + tokenizer (in parallel) ──> warm-up ──> ready ──SIGTERM──> drain ──> Drained, exit code 0
                         └───────────────┬──────────────┴───────────┘
                                   engine died ──> open requests get an error ──> its reason, exit code not 0

With `--api-workers` N this process is the first of N that answer on the port, and leads the others through the same life (`followers.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gantline_runtime import garbage, logs
from gantline_runtime.child_process import became_process_at
from gantline_runtime.config import EngineConfig, ServerConfig
from gantline_runtime.engine_client import EngineClient, EngineUnavailable
from gantline_runtime.engine_launch import EngineProcess
from gantline_runtime.engine_messages import EngineProgress, EngineReady
from gantline_runtime.server import smoke
from gantline_runtime.server.followers import Followers
from gantline_runtime.server.front import Front
from gantline_runtime.server.lifecycle import Lifecycle, State
from gantline_runtime.server.listening import FLUSH_S, bind_socket
from gantline_runtime.server.loading import load_model
from gantline_runtime.server.metrics import Metrics
from gantline_runtime.server.service import Model, Service
from gantline_runtime.server.worker_messages import CutOff, Die, Drain, FollowerSettings, Serve
from gantline_runtime.termination import Reason, TerminationMessage

__all__ = ["Announcer", "Runner"]

log = logging.getLogger("gantline.server")


@dataclass(frozen=True)
class Announcer:
    """What the process tells whoever started it."""

    listening: Callable[[str], None] = lambda url: None
    progress: Callable[[EngineProgress], None] = lambda progress: None
    ready: Callable[[str, Model, float], None] = lambda url, model, seconds: None


class Runner:
    """One server, and its engine's process, which it takes charge of."""

    def __init__(
        self,
        model_dir: Path,
        engine_config: EngineConfig,
        config: ServerConfig,
        launched: EngineProcess,
        *,
        version: str,
        announcer: Announcer | None = None,
    ) -> None:
        """Raises ConfigurationError if the port cannot be had, or a file of the server's settings cannot be used. Makes the event loop's
        objects: call it on the loop."""
        self._model_dir, self._engine_config, self._config, self._launched = model_dir, engine_config, config, launched
        self._announcer = announcer or Announcer()
        self.lifecycle = Lifecycle(began_at=became_process_at())
        self._metrics = Metrics(version)
        self._service = Service(engine_config, config, self.lifecycle, self._metrics)
        self._engine = EngineClient(
            on_progress=self._show_progress, on_report=self._metrics.engine, on_prefixes=self._service.prefixes.apply
        )
        self._service.engine = self._engine
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._interrupted = False
        self._followers = Followers(config.step_timeout)
        self._death: asyncio.Future[TerminationMessage] = asyncio.get_running_loop().create_future()
        for end in (self._engine.died, self._followers.died):
            end.add_done_callback(self._on_death)
        self._version = version
        if config.api_workers > 1 and config.port:
            bind_socket(config.host, config.port).close()  # a shared port would be shared with a server that is there already, too
        self._front = Front(self._service, config, version=version)

    @property
    def url(self) -> str:
        return self._front.url

    async def run(self) -> TerminationMessage:
        """Serve until told to stop or until the engine dies; the result says which. Raises GantlineError if the model cannot be served."""
        with self._signals():
            try:
                async with self._front.serving():
                    self._metrics.startup("listen", time.monotonic() - self.lifecycle.began_at)
                    self._announcer.listening(self.url)
                    return await self._live()
            finally:
                await self._followers.close()
                await self._engine.close()
                await self._service.close()

    async def _live(self) -> TerminationMessage:
        stop = asyncio.create_task(self._stop.wait())
        start = asyncio.create_task(self._start())
        try:
            await asyncio.wait((start, stop, self._death), return_when=asyncio.FIRST_COMPLETED)
            if start.done() and not self._death.done():
                start.result()  # raises what went wrong with the model
                await asyncio.wait((stop, self._death), return_when=asyncio.FIRST_COMPLETED)
            if self._death.done():
                return await self._die(self._death.result())
            return await self._drain()
        finally:
            for task in (stop, start):
                task.cancel()
            await asyncio.gather(stop, start, return_exceptions=True)

    # ---- start

    async def _start(self) -> None:
        self._engine.start(self._launched)
        self._followers.start(self._follower_settings())
        await asyncio.gather(
            self._load_model(),
            asyncio.wait((self._engine.ready, self._engine.died), return_when=asyncio.FIRST_COMPLETED),
        )
        if self._engine.died.done():
            return
        assert self._service.model is not None
        model = self._service.model
        await self._warm_up(self._engine.ready.result(), model)
        await self._followers.wait_loaded()
        seconds = time.monotonic() - self.lifecycle.began_at
        self._metrics.startup("total", seconds)
        await self._followers.tell(Serve(self._metrics.startup_phases))
        garbage.settle()
        self.lifecycle.enter(State.READY)
        self._announcer.ready(self.url, model, seconds)

    async def _load_model(self) -> None:
        await load_model(self._service, self._model_dir)
        garbage.settle()  # while the engine loads, so that what is left of it before ready takes no time

    def _follower_settings(self) -> list[FollowerSettings]:
        port = self._front.socket.getsockname()[1]
        return [
            FollowerSettings(
                number=number,
                engine_endpoint=self._engine.endpoint,
                control_endpoint=f"{self._engine.endpoint}-workers",
                parent_pid=os.getpid(),
                model_dir=str(self._model_dir),
                engine_config=asdict(self._engine_config),
                server_config=asdict(replace(self._config, port=port)),
                version=self._version,
                log_format=logs.resolve_format(self._config.log_format),
            )
            for number in range(1, self._config.api_workers)
        ]

    async def _warm_up(self, ready: EngineReady, model: Model) -> None:
        """The smoke request goes all the way, so that `ready` means that an answer was made, and the first client does not pay for it.
        Raises GantlineError if the answer is not one."""
        for phase, seconds in ready.phases.items():
            self._metrics.startup(phase, seconds)
        self._service.session_len, self._service.eos_token_ids = ready.session_len, frozenset(ready.eos_token_ids)
        self.lifecycle.show_progress("warm-up")
        began = time.monotonic()
        prompt = model.tokenizer.encode("Hello")[: max(1, min(4, ready.session_len - 2))] or [0]
        try:
            await smoke.ask(self._engine, prompt)
        except EngineUnavailable:
            await asyncio.shield(self._engine.died)
            return
        self._metrics.startup("warm-up", time.monotonic() - began)

    def _show_progress(self, progress: EngineProgress) -> None:
        self.lifecycle.show_progress(progress.phase, progress.done, progress.total)
        self._followers.post(progress)
        self._announcer.progress(progress)

    # ---- end

    async def _die(self, message: TerminationMessage) -> TerminationMessage:
        """The engine or an API process is gone: give every open request an error, and let the errors reach the clients."""
        self.lifecycle.enter(State.DEAD)
        self._engine.fail_all(EngineUnavailable(message.message, message.reason))
        self._front.cut_off()
        await self._followers.tell(Die(message.reason.value, message.message))
        await self._wait_until_idle(FLUSH_S)
        return message

    async def _drain(self) -> TerminationMessage:
        config, began = self._config, time.monotonic()
        # Ctrl-C at a terminal: no endpoints lag behind, and nobody wants to wait for the delay.
        delay = 0.0 if self._interrupted else min(config.drain_delay, config.drain_timeout)
        self.lifecycle.drain(delay)
        await self._followers.tell(Drain(delay))
        log.info("draining", extra=logs.fields(running=self._num_admitted, drain_delay=delay, drain_timeout=config.drain_timeout))
        if self._service.session_len:
            await self._wait_for_any(delay - (time.monotonic() - began))
        await self._followers.tell(Drain(0.0))  # whose answer has every request that was taken
        await self._wait_until_idle(config.drain_timeout - (time.monotonic() - began))
        if self._death.done():
            return await self._die(self._death.result())
        unfinished = self._num_admitted
        self._engine.fail_all(EngineUnavailable("the server is shutting down", Reason.DRAINED))
        self._front.cut_off()
        await self._followers.tell(CutOff())
        await self._wait_until_idle(FLUSH_S, hurry=False)
        log.info("drained", extra=logs.fields(unfinished=unfinished, seconds=round(time.monotonic() - began, 1)))
        text = "all requests were answered" if not unfinished else f"{unfinished} requests were cut off after {config.drain_timeout:g} s"
        return TerminationMessage(Reason.DRAINED, text)

    @property
    def _num_admitted(self) -> int:
        return self._service.num_admitted + self._followers.num_admitted

    async def _wait_until_idle(self, timeout_s: float, *, hurry: bool = True) -> None:
        idle = asyncio.create_task(self._be_idle())
        await self._wait_for_any(timeout_s, idle, hurry=hurry)
        idle.cancel()

    async def _be_idle(self) -> None:
        await self._service.idle.wait()
        await self._followers.wait_idle()

    async def _wait_for_any(self, timeout_s: float, *others: asyncio.Task[Any], hurry: bool = True) -> None:
        """Until `timeout_s`, one of `others`, or what ends every wait: the engine's death, and a second signal."""
        hurried = asyncio.create_task(self._hurry.wait())
        ends = (*others, *((self._death, hurried) if hurry else ()))
        if timeout_s > 0 and ends:
            await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _on_death(self, end: asyncio.Future[TerminationMessage]) -> None:
        if not end.cancelled() and not self._death.done():
            self._death.set_result(end.result())

    def _on_signal(self, number: int) -> None:
        """The first asks for a drain, a second one for an end to it."""
        if self._stop.is_set():
            self._hurry.set()
        self._interrupted = self._interrupted or number == signal.SIGINT
        self._stop.set()
