"""Renders chat templates in a process of its own, so that what a checkpoint brings along can neither stall nor exhaust the server.

    parent -> child   4 bytes of length, then {"messages", "variables"} as MessagePack          child -> parent   {"text"} or {"error"}

The child may take `MEMORY_BYTES` beyond what it has at its start. One that takes longer than the time limit is killed; the next request
gets a new one. It holds neither secrets nor sockets, and dies with its parent. A rendering costs the detour of a pipe, about 0.2 ms.
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
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import msgspec

from gantline_runtime.chat_template import ChatTemplate, TemplateError

__all__ = ["TemplateRenderer"]

TIMEOUT_S = 10.0
MEMORY_BYTES = 1 << 30
_PR_SET_PDEATHSIG = 1


class TemplateRenderer:
    """The parent's side. Renderings are made one after another."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, timeout_s: float = TIMEOUT_S) -> None:
        """Raises TemplateError if `source` does not compile."""
        ChatTemplate(source, special_tokens)
        self._setup = msgspec.json.encode({"source": source, "special_tokens": dict(special_tokens)})
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None

    async def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """Raises TemplateError, also for a template that takes too long or too much memory."""
        payload = msgspec.msgpack.encode({"messages": messages, "variables": variables})
        async with self._lock:
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await self._exchange(payload)
            except TimeoutError:
                raise TemplateError(f"the model's chat template took longer than {self._timeout_s:g} s for these messages") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                raise TemplateError("the model's chat template crashed its process on these messages") from None
        if "error" in answer:
            raise TemplateError(str(answer["error"]))
        return str(answer["text"])

    async def _exchange(self, payload: bytes) -> dict[str, Any]:
        """Whatever interrupts this leaves the pipe in an unknown state, so the child goes with it."""
        child = await self._start()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(len(payload).to_bytes(4, "little") + payload)
            await child.stdin.drain()
            size = int.from_bytes(await child.stdout.readexactly(4), "little")
            answer: dict[str, Any] = msgspec.msgpack.decode(await child.stdout.readexactly(size))
            return answer
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> asyncio.subprocess.Process:
        if self._child is None or self._child.returncode is not None:
            self._child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "gantline_runtime.server.template_process", str(os.getpid())),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                limit=1 << 20,
            )
            assert self._child.stdin is not None
            self._child.stdin.write(len(self._setup).to_bytes(4, "little") + self._setup)
        return self._child

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
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    setup = msgspec.json.decode(_read(requests) or b"{}")
    template = ChatTemplate(setup["source"], setup["special_tokens"])
    limit = _address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while (payload := _read(requests)) is not None:
        answer = msgspec.msgpack.encode(_answer(template, payload))
        answers.write(len(answer).to_bytes(4, "little") + answer)
        answers.flush()


def _answer(template: ChatTemplate, payload: bytes) -> dict[str, str]:
    request = msgspec.msgpack.decode(payload)
    try:
        text = template.render(request["messages"], **request["variables"])
        text.encode()  # a template can make lone surrogates, which no encoder takes
    except (TemplateError, UnicodeEncodeError) as error:
        return {"error": str(error)}
    return {"text": text}


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(4)
    return stream.read(int.from_bytes(head, "little")) if len(head) == 4 else None


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
