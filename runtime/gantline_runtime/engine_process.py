"""The engine's own process: takes requests from a socket, steps the engine, sends tokens back. Nothing here ever waits for a client.

    python -m gantline_runtime.engine_process '{"endpoint": "ipc://...", "model_dir": "...", ...}'      (EngineSettings as JSON)

Between two steps it reads all messages that have arrived, so a request joins, and an aborted one leaves, at the next step. At least every
`REPORT_INTERVAL_S` it says how it fares; when that stops, a step is stuck, and the API process turns `/health`. It dies with its parent,
and ignores the signals that a terminal or an init process sends to all processes at once: the API process decides when it ends.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq

from gantline_runtime import garbage, logs, termination
from gantline_runtime.child_process import became_process_at, become_child
from gantline_runtime.compilation import announce_compilations, loaded_kernels
from gantline_runtime.config import EngineConfig, from_mapping
from gantline_runtime.engine_messages import (
    ApiMessage,
    EngineBusy,
    EngineFailed,
    EngineMessage,
    EngineProgress,
    EngineReady,
    EngineReport,
    PrefixChanges,
    RequestRefused,
    Shutdown,
    StepOutputs,
)
from gantline_runtime.engine_settings import EngineSettings
from gantline_runtime.failures import describe_exception
from gantline_runtime.gpu_opening import begin_opening
from gantline_runtime.messages import AbortRequest, EngineRequest, TokenOutput
from gantline_runtime.reading_ahead import ReadingAhead
from gantline_runtime.torch_import import without_tracing

__all__ = ["Engine", "EngineServer", "build_report", "main"]

REPORT_INTERVAL_S = 0.5
_PROGRESS_INTERVAL_S = 0.1
_LINGER_MS = 2000
_REST_S = 1.0
"""Without work, until the time is used to make things ready: the first request after that waits for one of them."""

log = logging.getLogger("gantline.engine")


class Engine(Protocol):
    """What this process needs of `gantline_runtime.engine.LLMEngine`."""

    @property
    def session_len(self) -> int: ...
    @property
    def eos_token_ids(self) -> Sequence[int]: ...
    def add_request(self, request: EngineRequest) -> None: ...
    def abort(self, request_id: str, num_tokens: int | None) -> Any: ...
    def step(self) -> list[TokenOutput]: ...
    def prepare(self) -> bool: ...
    def has_work(self) -> bool: ...
    def stats(self) -> Any: ...
    def prefix_marks(self) -> list[int]: ...
    def take_prefix_changes(self) -> tuple[list[int], list[int]]: ...
    def close(self) -> None: ...


class EngineServer:
    """Moves messages between a ROUTER socket and an engine. Each request belongs to the peer that sent it."""

    def __init__(
        self, socket: zmq.Socket[bytes], load: Callable[[Callable[[Any], None]], Engine], starts: tuple[float, float] | None = None
    ) -> None:
        """`starts`: when the server and this process were started, by `time.monotonic` (default: now)."""
        self._socket = socket
        self._starts = (time.monotonic(),) * 2 if starts is None else starts
        self._load = load
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ApiMessage)
        self._peers: set[bytes] = set()
        self._ready: EngineReady | None = None
        """For who comes later."""
        self._owners: dict[str, bytes] = {}
        self._stopping = False
        self._last_report = 0.0
        self._worked_at = time.monotonic()
        self._epoch = secrets.token_hex(8)
        self._num_prefix_changes = 0
        self._logged_kernels: dict[str, int] = {}

    def run(self) -> None:
        """Load the engine, tell how that goes, and serve until told to end. Raises whatever the engine raises."""
        self._await_peer()
        phases = _Phases(self._broadcast, self._starts)
        engine = self._load(phases.on_progress)
        try:
            announce_compilations(lambda seconds: self._broadcast(EngineBusy(seconds)))
            self._worked_at = time.monotonic()
            self._ready = EngineReady(session_len=engine.session_len, eos_token_ids=sorted(engine.eos_token_ids), phases=phases.finish())
            self._broadcast(self._ready)
            self._broadcast(self._all_prefixes(engine))
            while not self._stopping:
                self._turn(engine)
        finally:
            engine.close()

    def _turn(self, engine: Engine) -> None:
        """Read what has arrived, and take a step; with nothing to do for a while, make something ready, or wait."""
        self._receive(engine, wait=not engine.has_work() and not self._prepare(engine))
        if engine.has_work() and not self._stopping:
            self._send(engine.step())
            self._worked_at = time.monotonic()
        self._report_if_due(engine)

    def _prepare(self, engine: Engine) -> bool:
        return time.monotonic() - self._worked_at >= _REST_S and engine.prepare()

    def fail(self, error: BaseException) -> int:
        """Tell all peers why this process ends; returns its exit code."""
        message = describe_exception(error)
        self._broadcast(EngineFailed(reason=message.reason.value, message=message.message, cure=message.cure))
        return termination.exit_code(message.reason)

    def _await_peer(self) -> None:
        """A ROUTER can only answer who has spoken: the API process says hello with an empty message."""
        peer, _ = self._socket.recv_multipart()
        self._peers.add(peer)

    def _receive(self, engine: Engine, *, wait: bool) -> None:
        """Handle all messages that are there; with `wait`, sleep until one comes or the next report is due."""
        if wait and not self._socket.poll(max(1, int(1000 * (self._last_report + REPORT_INTERVAL_S - time.monotonic())))):
            return
        while not self._stopping:
            try:
                peer, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if peer not in self._peers:
                self._welcome(engine, peer)
            if data:
                self._handle(engine, peer, self._decoder.decode(data))

    def _welcome(self, engine: Engine, peer: bytes) -> None:
        """Take in a peer that speaks for the first time, and tell it what the others know."""
        if self._ready is not None:
            self._report_prefixes(engine)
            self._send_to(peer, self._ready)
            self._send_to(peer, self._all_prefixes(engine))
        self._peers.add(peer)

    def _handle(self, engine: Engine, peer: bytes, message: ApiMessage) -> None:
        match message:
            case EngineRequest():
                self._add(engine, peer, message)
            case AbortRequest():
                self._owners.pop(message.request_id, None)
                engine.abort(message.request_id, message.num_tokens)
            case Shutdown():
                self._stopping = True

    def _add(self, engine: Engine, peer: bytes, request: EngineRequest) -> None:
        try:
            engine.add_request(request)
        except Exception as error:
            refusal = RequestRefused(
                request_id=request.request_id,
                code=_refusal_code(error),
                message=str(error),
                retry_after_s=getattr(error, "retry_after_s", 0.0),
            )
            self._send_to(peer, refusal)
            if _refusal_code(error) == "error":
                log.exception("a request could not be added", extra=logs.fields(request_id=request.request_id))
        else:
            self._owners[request.request_id] = peer

    def _send(self, outputs: Iterable[TokenOutput]) -> None:
        for_peer: defaultdict[bytes, list[TokenOutput]] = defaultdict(list)
        for output in outputs:
            last = output.finish_reason is not None
            peer = self._owners.pop(output.request_id, None) if last else self._owners.get(output.request_id)
            if peer is not None:  # else it was aborted while its step ran
                for_peer[peer].append(output)
        for peer, own in for_peer.items():
            self._send_to(peer, StepOutputs(own))

    def _report_if_due(self, engine: Engine) -> None:
        now = time.monotonic()
        if now - self._last_report >= REPORT_INTERVAL_S:
            self._last_report = now
            report = build_report(engine.stats())
            self._broadcast(report)
            self._log_kernels(report.kernels)
            self._report_prefixes(engine)

    def _log_kernels(self, kernels: dict[str, int]) -> None:
        if kernels != self._logged_kernels and any(kernels.values()):
            log.info("Triton kernels: %(image)d from the image, %(cache)d from the cache, %(compiled)d compiled", kernels)
        self._logged_kernels = kernels

    def _report_prefixes(self, engine: Engine) -> None:
        added, removed = engine.take_prefix_changes()
        if added or removed:
            self._num_prefix_changes += 1
            self._broadcast(PrefixChanges(epoch=self._epoch, number=self._num_prefix_changes, added=added, removed=removed))

    def _all_prefixes(self, engine: Engine) -> PrefixChanges:
        """For who has heard nothing yet, right after the changes were reported."""
        return PrefixChanges(epoch=self._epoch, number=self._num_prefix_changes, whole=True, added=engine.prefix_marks())

    def _broadcast(self, message: EngineMessage) -> None:
        for peer in self._peers:
            self._send_to(peer, message)

    def _send_to(self, peer: bytes, message: EngineMessage) -> None:
        self._socket.send_multipart([peer, self._encoder.encode(message)])


class _Phases:
    """Passes an engine's progress on, at most every tenth of a second, and measures how long each phase took.

    `launch` lasts from the server's start to this process's, `import` from there to the first word of the engine.
    """

    def __init__(self, send: Callable[[EngineMessage], None], starts: tuple[float, float]) -> None:
        self._send = send
        self._phase, self._began = "launch", starts[0]
        self._sent_at = 0.0
        self.seconds: dict[str, float] = {}
        self._close(starts[1])
        self._phase = "import"
        send(EngineProgress(phase=self._phase))

    def on_progress(self, progress: Any) -> None:
        """`progress` has `phase`, `done` and `total`."""
        now = time.monotonic()
        if progress.phase != self._phase:
            self._close(now)
            self._phase = progress.phase
        elif now - self._sent_at < _PROGRESS_INTERVAL_S:
            return
        self._sent_at = now
        self._send(EngineProgress(phase=progress.phase, done=int(progress.done), total=int(progress.total)))

    def finish(self) -> dict[str, float]:
        self._close(time.monotonic())
        return self.seconds

    def _close(self, now: float) -> None:
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._began
        self._began = now


_COPIED = (
    "num_running",
    "num_waiting",
    "seconds_without_progress",
    "num_waiting_tokens",
    "seconds_until_room",
    "cache_usage",
    "num_cache_blocks",
    "prefix_hit_rate",
    "num_queried_tokens",
    "num_cached_tokens",
    "num_shared_tokens",
    "num_generated_tokens",
    "num_preemptions",
    "num_steps",
)


def build_report(stats: Any) -> EngineReport:
    """`gantline_runtime.engine.EngineStats` as a message."""
    promised, reserved = _memory_parts(stats)
    return EngineReport(
        **{name: getattr(stats, name) for name in _COPIED},
        step_times={name.removesuffix("_s"): seconds for name, seconds in vars(stats.step_times).items()},
        promised_bytes=promised,
        reserved_bytes=reserved,
        kernels=loaded_kernels(),
        about=dict(stats.about),
    )


def _memory_parts(stats: Any) -> tuple[dict[str, int], dict[str, int]]:
    """(promised, reserved) bytes by part; what is not measured on this device is left out of both."""
    memory, cache_tokens = stats.memory, stats.num_cache_blocks * stats.block_size
    parts = {
        "weights": (memory.estimated_weight_bytes, memory.weight_bytes),
        "cache": (memory.estimated_cache_bytes_per_token * cache_tokens, memory.cache_bytes),
        "workspace": (memory.estimated_workspace_bytes, memory.workspace_bytes),
        "context": (memory.estimated_context_bytes, memory.context_bytes),
    }
    measured = {name: pair for name, pair in parts.items() if pair[1]}
    return {name: promised for name, (promised, _) in measured.items()}, {name: reserved for name, (_, reserved) in measured.items()}


def _refusal_code(error: Exception) -> Any:
    """Told apart by name: `gantline_runtime.request` is the engine's side, and an engine of a test has its own."""
    return {"QueueFull": "queue_full", "RequestRejected": "invalid"}.get(type(error).__name__, "error")


def _begin_import(name: str) -> threading.Thread:
    """Import a module beside what comes next, until the thread ends. What goes wrong is raised to who imports it then, a second time."""

    def work() -> None:
        with suppress(BaseException), garbage.importing(), without_tracing():
            importlib.import_module(name)

    thread = threading.Thread(target=work, name="gantline-import", daemon=True)
    thread.start()
    return thread


def _start_ranks(settings: EngineSettings) -> Any:
    """The other ranks' processes, which import while this one does; None where there are none."""
    size = settings.engine_config.get("tp", 1)
    if not isinstance(size, int) or size == 1:
        return None
    from gantline_runtime.ranks import Ranks

    return Ranks(size, str(settings.engine_config.get("device", "auto")))


def _load(
    settings: EngineSettings, importing: threading.Thread, ahead: ReadingAhead, ranks: Any
) -> Callable[[Callable[[Any], None]], Engine]:
    def load(on_progress: Callable[[Any], None]) -> Engine:
        importing.join()
        ahead.stop()
        module, name = settings.engine.split(":")
        config = from_mapping(EngineConfig, settings.engine_config)
        build = getattr(importlib.import_module(module), name)
        more = {} if ranks is None else {"ranks": ranks}
        engine: Engine = build(settings.model_dir, config, on_progress=on_progress, **more)
        garbage.settle()
        garbage.collect_by_hand()
        return engine

    return load


def main(arguments: Sequence[str]) -> int:
    settings = msgspec.json.decode(arguments[0], type=EngineSettings)
    become_child(settings.parent_pid)
    logs.configure(settings.log_level, settings.log_format)
    ranks = _start_ranks(settings)
    begin_opening(str(settings.engine_config.get("device", "auto")))
    ahead = ReadingAhead(Path(settings.model_dir))
    importing = _begin_import(settings.engine.partition(":")[0])
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    socket.set_hwm(0)  # a ROUTER drops what exceeds its mark; the number of running requests bounds the queue instead
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.bind(settings.endpoint)
    server = EngineServer(socket, _load(settings, importing, ahead, ranks), (became_process_at(settings.parent_pid), became_process_at()))
    code = 0
    try:
        server.run()
    except BaseException as error:
        logging.getLogger("gantline.engine").exception("the engine failed")
        code = server.fail(error)
    socket.close()
    context.term()
    return code


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    logging.shutdown()
    os._exit(exit_code)  # threads of libraries must not keep a dead engine alive
