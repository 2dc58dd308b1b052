"""A process beside the API process, for work that would hold up its streams, or that it must be kept from: it answers each message by one.

    parent -> child, child -> parent   4 bytes of length (little-endian), then the message, by the child's stdin and stdout

It holds neither secrets nor sockets, and dies with its parent. Whatever interrupts an exchange leaves the pipes in an unknown state, so the
child goes with it; the next exchange needs a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import BinaryIO

from gantline_runtime.child_process import become_child

__all__ = ["Helper", "HelperCrashed", "HelperTooSlow", "answer_messages"]


class HelperCrashed(Exception):
    """The child ended before it had answered."""


class HelperTooSlow(Exception):
    """The child did not answer in time, and was killed."""


class Helper:
    """The parent's side. One exchange at a time."""

    def __init__(self, module: str) -> None:
        """`module` calls `answer_messages` where it is run."""
        self._module = module
        self._child: asyncio.subprocess.Process | None = None

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.returncode is None

    async def start(self) -> None:
        self._child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", self._module, str(os.getpid())), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    async def exchange(self, message: bytes, timeout_s: float) -> bytes:
        """The child's answer to `message`. Raises HelperCrashed or HelperTooSlow."""
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                child.stdin.write(len(message).to_bytes(4, "little"))
                child.stdin.write(message)
                await child.stdin.drain()
                size = int.from_bytes(await child.stdout.readexactly(4), "little")
                return await child.stdout.readexactly(size)
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError):
                raise HelperTooSlow from None
            if isinstance(error, (asyncio.IncompleteReadError, ConnectionError)):
                raise HelperCrashed from None
            raise

    async def close(self) -> None:
        child, self._child = self._child, None
        if child is not None and child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


def answer_messages(prepare: Callable[[], Callable[[bytes], bytes]]) -> None:
    """The child's side: `prepare` once, and then what it returns for each message, until the pipe closes."""
    become_child(int(sys.argv[1]))
    answer = prepare()
    while (message := _read(sys.stdin.buffer)) is not None:
        told = answer(message)
        sys.stdout.buffer.write(len(told).to_bytes(4, "little"))
        sys.stdout.buffer.write(told)
        sys.stdout.buffer.flush()


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(4)
    return stream.read(int.from_bytes(head, "little")) if len(head) == 4 else None
