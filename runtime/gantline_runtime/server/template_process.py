"""Renders chat templates in a process of its own, so that what a checkpoint brings along can neither stall nor exhaust the server.

    parent -> child   {"source", "special_tokens"}, then {"messages", "variables"} any number of times
    child -> parent   {"text"} or {"error"} for each                      (MessagePack, as `helper_process.py` passes it on)

The template is not even compiled in the parent: Jinja computes constant expressions while it compiles. The child may take `MEMORY_BYTES`
beyond what it has at its start; one that takes longer than the time limit is killed, and the next request gets a new one. A rendering costs
the detour of a pipe, about 0.2 ms.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from gantline_runtime.chat_template import ChatTemplate, TemplateError
from gantline_runtime.server.helper_process import Helper, HelperCrashed, HelperTooSlow, answer_messages

__all__ = ["TemplateRenderer"]

TIMEOUT_S = 10.0
START_TIMEOUT_S = 60.0
"""For a child to start and to compile the template; a busy machine takes seconds to start a Python."""
MEMORY_BYTES = 512 << 20


class TemplateRenderer:
    """The parent's side. Renderings are made one after another."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, timeout_s: float = TIMEOUT_S) -> None:
        self._setup = msgspec.msgpack.encode({"source": source, "special_tokens": dict(special_tokens)})
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._helper = Helper("gantline_runtime.server.template_process")

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
            await self._ensure_child()
            return await self._exchange(payload, self._timeout_s)

    async def _ensure_child(self) -> None:
        if self._helper.running:
            return
        await self._helper.start()
        try:
            await self._exchange(self._setup, START_TIMEOUT_S)
        except TemplateError:
            await self.close()
            raise

    async def _exchange(self, payload: bytes, timeout_s: float) -> str:
        try:
            answer = msgspec.msgpack.decode(await self._helper.exchange(payload, timeout_s))
        except HelperTooSlow:
            raise TemplateError(f"the model's chat template took longer than {timeout_s:g} s") from None
        except HelperCrashed:
            raise TemplateError("the model's chat template crashed its process") from None
        if "error" in answer:
            raise TemplateError(str(answer["error"]))
        return str(answer["text"])

    async def close(self) -> None:
        await self._helper.close()


def _prepare() -> Callable[[bytes], bytes]:
    """The child's side: a template first, then messages to render."""
    limit = _address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    template: ChatTemplate | None = None

    def answer(payload: bytes) -> bytes:
        nonlocal template
        request = msgspec.msgpack.decode(payload)
        try:
            if template is None:
                template, told = ChatTemplate(**request), {"text": ""}
            else:
                told = {"text": template.render(request["messages"], **request["variables"])}
            return msgspec.msgpack.encode(told)  # not of a template's lone surrogates, which no tokenizer takes either
        except (TemplateError, UnicodeEncodeError) as error:
            return msgspec.msgpack.encode({"error": str(error)})

    return answer


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    answer_messages(_prepare)
