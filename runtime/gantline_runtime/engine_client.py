"""The API process's end of the engine: sends requests to its process, hands out tokens, and notices when it dies or is stuck.

A `RequestGroup` holds the requests that one client waits for (the choices of one answer). It never blocks the reader: tokens that nobody
has taken yet wait in the group, up to `MOST_UNTAKEN_TOKENS`. `close()` aborts what is unfinished, which frees its blocks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from gantline_runtime.child_process import wait_for_exit
from gantline_runtime.engine_launch import EngineProcess
from gantline_runtime.engine_messages import (
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
from gantline_runtime.failures import OutOfMemoryKills, describe_exit
from gantline_runtime.messages import AbortRequest, EngineRequest, TokenOutput
from gantline_runtime.termination import Reason, TerminationMessage

__all__ = ["MOST_UNTAKEN_TOKENS", "EngineClient", "EngineUnavailable", "RequestFailed", "RequestGroup"]

MOST_UNTAKEN_TOKENS = 1 << 15
"""Of one client's answer, all its choices together: 10 MB here, 45 MB with 20 log-probabilities each."""

log = logging.getLogger("gantline.server")


class EngineUnavailable(Exception):
    """The engine is gone, or the server ends: this request cannot go on. `reason` is that of the termination message."""

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


class RequestFailed(Exception):
    """This request alone was refused or given up. `code` is `queue_full` (then `retry_after_s` says when to try again), `invalid`,
    `invalid_grammar`, `deadline`, `client_too_slow` or `error`."""

    def __init__(self, message: str, code: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class RequestGroup:
    """Requests that succeed or fail together. For one task at a time."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._running: set[str] = set()
        self._pending: list[TokenOutput] = []
        self._num_untaken = 0
        self._failure: Exception | None = None
        self._arrived = asyncio.Event()

    def submit(self, request: EngineRequest) -> None:
        """Send a request. Raises EngineUnavailable if the engine is gone."""
        self._client._submit(request, self)
        self._running.add(request.request_id)

    async def next(self) -> list[TokenOutput]:
        """All outputs since the last call, at least one, in the order they came. Raises EngineUnavailable or RequestFailed.

        Not to be called when every request has ended and all outputs were taken: it would wait for ever.
        """
        await self._arrived.wait()
        outputs, self._pending, self._num_untaken = self._pending, [], 0
        if self._failure is None:
            self._arrived.clear()
        elif not outputs:
            raise self._failure
        return outputs

    def abort(self, request_id: str, num_tokens: int | None = None) -> None:
        """End one request; nothing more comes of it, unless it has arrived already. `num_tokens` as in `AbortRequest`."""
        if request_id in self._running:
            self._running.discard(request_id)
            self._client._abort(request_id, num_tokens)

    def close(self) -> None:
        """Abort all that is unfinished."""
        for request_id in list(self._running):
            self.abort(request_id)

    def _push(self, output: TokenOutput) -> None:
        if output.finish_reason == "error":
            self.fail(RequestFailed(output.error or "no cause was given", output.error_code))
            return
        if output.finish_reason is not None:
            self._running.discard(output.request_id)
        self._pending.append(output)
        self._num_untaken += len(output.token_ids)
        self._arrived.set()
        if self._num_untaken > MOST_UNTAKEN_TOKENS and self._running:
            cause = f"The client was more than {MOST_UNTAKEN_TOKENS} tokens behind its answer, which was given up."
            self.fail(RequestFailed(cause, "client_too_slow"))

    def fail(self, error: Exception) -> None:
        """End all that is unfinished with `error`; what has arrived is still handed out."""
        self._failure = self._failure or error
        self._arrived.set()
        self.close()


class EngineClient:
    """One engine process and all that is known about it. Callbacks run on the event loop."""

    def __init__(
        self,
        *,
        on_progress: Callable[[EngineProgress], None] = lambda _: None,
        on_report: Callable[[EngineReport], None] = lambda _: None,
        on_prefixes: Callable[[PrefixChanges], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_progress, self._on_report, self._on_prefixes, self._clock = on_progress, on_report, on_prefixes, clock
        self._groups: dict[str, RequestGroup] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)
        self._launched: EngineProcess | None = None
        self._failed: EngineFailed | None = None
        self.endpoint = ""
        """Where the engine process listens; others may `connect` to it too."""
        self._closing = False
        self.ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self.died: asyncio.Future[TerminationMessage] = asyncio.get_running_loop().create_future()
        """Set when the process has ended without being told to."""
        self.report = EngineReport()
        self._heard_at = clock()
        self._allowed_silence = 0.0

    # ---- life

    def start(self, launched: EngineProcess) -> None:
        """Take charge of a process; `ready` or `died` tells how it goes on."""
        self._launched = launched
        self.connect(launched.endpoint)
        self._watch = asyncio.create_task(self._watch_process(launched))

    def connect(self, endpoint: str) -> None:
        """Talk to an engine process that is there, or is about to be; `start` does it for its own."""
        self.endpoint = endpoint
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)
        self._post(b"")
        self._reader = asyncio.create_task(self._read_messages())

    def declare_dead(self, message: TerminationMessage) -> None:
        """The process has ended; every request fails."""
        if self.died.done():
            return
        self.died.set_result(message)
        if not self.ready.done():
            self.ready.cancel()
        self.fail_all(EngineUnavailable(f"the engine has died: {message.message}", message.reason))

    @property
    def pid(self) -> int | None:
        return self._launched.process.pid if self._launched is not None else None

    async def close(self, grace_s: float = 5.0) -> None:
        """End the process: ask, wait `grace_s`, then kill. Requests that still run fail."""
        self._closing = True
        self.fail_all(EngineUnavailable("the server is shutting down", Reason.DRAINED))
        process = self._launched.process if self._launched is not None else None
        if process is not None and process.poll() is None:
            if self.ready.done():  # before that it would not read it
                self._post(self._encoder.encode(Shutdown()))
                await asyncio.wait([self._watch], timeout=grace_s)
            if process.poll() is None:
                process.kill()
        if process is not None:
            await asyncio.gather(self._watch, return_exceptions=True)
            process.wait()
        if self.endpoint:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            self._socket.close()
            self._context.term()
        if self._launched is not None:
            self._launched.discard()

    # ---- requests

    def open_group(self) -> RequestGroup:
        return RequestGroup(self)

    def fail_all(self, error: EngineUnavailable) -> None:
        """End every request with `error`."""
        for group in set(self._groups.values()):
            group.fail(error)

    def _submit(self, request: EngineRequest, group: RequestGroup) -> None:
        if self.died.done() or self._closing:
            raise EngineUnavailable("the engine is not running", Reason.INTERNAL_ERROR)
        self._groups[request.request_id] = group
        self._post(self._encoder.encode(request))

    def _abort(self, request_id: str, num_tokens: int | None) -> None:
        if self._groups.pop(request_id, None) is not None and not self.died.done() and not self._socket.closed:
            self._post(self._encoder.encode(AbortRequest(request_id, num_tokens)))

    def seconds_without_progress(self) -> float:
        """Seconds since the engine was last heard of, beyond what it announced, or since it last got on with its work, by its own word. It
        speaks at least twice a second between steps, so more silence means a long step."""
        silence = max(0.0, self._clock() - self._heard_at - self._allowed_silence)
        return silence + self.report.seconds_without_progress

    def _post(self, data: bytes) -> None:
        """Send without waiting: with no high-water mark, zmq takes the message at once."""
        self._socket.send(data)

    # ---- what the engine says

    async def _read_messages(self) -> None:
        while True:
            message = self._decoder.decode(await self._socket.recv())
            self._heard_at = self._clock()
            self._allowed_silence = message.seconds if isinstance(message, EngineBusy) else 0.0
            try:
                self._handle(message)
            except Exception:
                log.exception("a message of the engine could not be handled")

    def _handle(self, message: EngineMessage) -> None:
        match message:
            case StepOutputs():
                for output in message.outputs:
                    self._deliver(output)
            case EngineReport():
                self.report = message
                self._on_report(message)
            case PrefixChanges():
                self._on_prefixes(message)
            case RequestRefused():
                group = self._groups.pop(message.request_id, None)
                if group is not None:
                    group.fail(RequestFailed(message.message, message.code, message.retry_after_s))
            case EngineProgress():
                self._on_progress(message)
            case EngineReady():
                self.ready.set_result(message)
            case EngineFailed():
                self._failed = message

    def _deliver(self, output: TokenOutput) -> None:
        group = self._groups.get(output.request_id)
        if group is None:  # aborted in the meantime
            return
        if output.finish_reason is not None:
            del self._groups[output.request_id]
        group._push(output)

    async def _watch_process(self, launched: EngineProcess) -> None:
        """Wait for the end of the process, then say why it ended."""
        returncode = await wait_for_exit(launched.process)
        if self._closing:
            return
        await asyncio.sleep(0.05)  # its last message may still be on the way
        self.declare_dead(self._last_words(returncode, launched.kills))

    def _last_words(self, returncode: int, kills: OutOfMemoryKills) -> TerminationMessage:
        if self._failed is not None:
            return TerminationMessage(Reason(self._failed.reason), self._failed.message, self._failed.cure)
        return describe_exit(returncode, killed_for_memory=kills.happened())
