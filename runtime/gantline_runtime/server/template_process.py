"""Renders chat templates in a process of its own, so that what a checkpoint brings along can neither stall nor exhaust the server.

    parent -> child   {"source", "special_tokens"}, then {"messages", "variables"} any number of times
    child -> parent   {"text"} or {"error"} for each                      (4 bytes of length, then MessagePack)

The template is not even compiled in the parent: Jinja computes constant expressions while it compiles. The child may take `MEMORY_BYTES`
beyond what it has at its start; one that takes longer than the time limit is killed, and the next request gets a new one. It holds neither
secrets nor sockets, and dies with its parent. A rendering costs the detour of a pipe, about 0.2 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, BinaryIO

import msgspec

from gantline_runtime.chat_template import ChatTemplate, TemplateError

__all__ = ["TemplateRenderer"]

TIMEOUT_S = 10.0
START_TIMEOUT_S = 60.0
"""For a child to start and to compile the template; a busy machine takes seconds to start a Python."""
MEMORY_BYTES = 512 << 20
_PR_SET_PDEATHSIG = 1


class TemplateRenderer:
    """The parent's side. Renderings are made one after another."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, timeout_s: float = TIMEOUT_S) -> None:
        self._setup = msgspec.msgpack.encode({"source": source, "special_tokens": dict(special_tokens)})
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the child before it is needed. Raises TemplateError if the template does not compile."""
        async with self._lock:
            await self._ensure_child()

    async def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """Raises TemplateError, also for a template that takes too long or too much memory."""
        try:
            payload = msgspec.msgpack.encode({"messages": messages, "variables": variables})
        except (OverflowError, ValueError, TypeError, RecursionError) as error:  # such as integers of more than 64 bits
            raise TemplateError(f"the variables of the chat template cannot be used: {error}") from None
        rendering = asyncio.create_task(self._render(payload))
        # A client that leaves in the middle must not cost the others the child: the exchange ends as it would have.
        rendering.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(rendering)

    async def _render(self, payload: bytes) -> str:
        async with self._lock:
            child = await self._ensure_child()
            return await self._in_time(self._exchange(child, payload), self._timeout_s)

    async def _in_time(self, exchange: Coroutine[Any, Any, str], timeout_s: float) -> str:
        """Whatever interrupts an exchange leaves the pipe in an unknown state, so the child goes with it."""
        try:
            async with asyncio.timeout(timeout_s):
                return await exchange
        except TemplateError:
            raise
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError):
                raise TemplateError(f"the model's chat template took longer than {timeout_s:g} s") from None
            if isinstance(error, (asyncio.IncompleteReadError, ConnectionError)):
                raise TemplateError("the model's chat template crashed its process") from None
            raise

    async def _ensure_child(self) -> asyncio.subprocess.Process:
        if self._child is None or self._child.returncode is not None:
            self._child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "gantline_runtime.server.template_process", str(os.getpid())),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            try:
                await self._in_time(self._exchange(self._child, self._setup), START_TIMEOUT_S)
            except TemplateError:
                await self.close()
                raise
        return self._child

    @staticmethod
    async def _exchange(child: asyncio.subprocess.Process, payload: bytes) -> str:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(len(payload).to_bytes(4, "little") + payload)
        await child.stdin.drain()
        size = int.from_bytes(await child.stdout.readexactly(4), "little")
        answer = msgspec.msgpack.decode(await child.stdout.readexactly(size))
        if "error" in answer:
            raise TemplateError(str(answer["error"]))
        return str(answer["text"])

    async def close(self) -> None:
        child, self._child = self._child, None
        if child is not None and child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


def main() -> None:
    """The child's side: a template first, then messages to render until the pipe closes."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    limit = _address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    template: ChatTemplate | None = None
    while (payload := _read(sys.stdin.buffer)) is not None:
        request = msgspec.msgpack.decode(payload)
        try:
            if template is None:
                template, answer = ChatTemplate(**request), {"text": ""}
            else:
                answer = {"text": template.render(request["messages"], **request["variables"])}
            encoded = msgspec.msgpack.encode(answer)  # not of a template's lone surrogates, which no tokenizer takes either
        except (TemplateError, UnicodeEncodeError) as error:
            encoded = msgspec.msgpack.encode({"error": str(error)})
        sys.stdout.buffer.write(len(encoded).to_bytes(4, "little") + encoded)
        sys.stdout.buffer.flush()


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(4)
    return stream.read(int.from_bytes(head, "little")) if len(head) == 4 else None


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
