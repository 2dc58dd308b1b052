"""The items of a response while they are made, and the typed events that tell of them.

    created, in_progress
        output_item.added  (content_part.added  delta*  done  content_part.done | function_call_arguments.delta* .done)  output_item.done
    completed | incomplete | failed

Items follow one another: reasoning, text and function calls in the order in which the chat's chunks bring them. `response` is at all
times what a client that asks for no stream would be given.
"""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Iterator
from typing import Any

__all__ = ["ResponseItems"]

Event = dict[str, Any]

_TEXT_EVENTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}


def _empty_part(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


class ResponseItems:
    def __init__(self, frame: dict[str, Any]) -> None:
        self.response = frame
        self._number = 0
        self._open: dict[str, Any] | None = None
        self._call_index: int | None = None

    def begin(self) -> Iterator[Event]:
        yield self._lifecycle("response.created")
        yield self._lifecycle("response.in_progress")

    def take(self, delta: dict[str, Any], logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """The events that the `delta` of a chat's chunk means. Log-probabilities are told of text alone, as OpenAI does."""
        if delta.get("reasoning_content"):
            yield from self._add_text("reasoning", delta["reasoning_content"], [])
        in_message = self._open is not None and self._open["type"] == "message"
        if delta.get("content") or (logprobs and in_message and not delta.keys() & {"reasoning_content", "tool_calls"}):
            yield from self._add_text("message", delta.get("content") or "", logprobs)
        for call in delta.get("tool_calls") or ():
            yield from self._add_call(call)

    def end(self, finish_reason: str, usage: dict[str, Any]) -> Iterator[Event]:
        if not self.response["output"]:
            yield from self._open_item("message", content=[], role="assistant")
        complete = finish_reason != "length"
        yield from self._close("completed" if complete else "incomplete")
        status = "completed" if complete else "incomplete"
        details = None if complete else {"reason": "max_output_tokens"}
        self.response |= {"status": status, "incomplete_details": details, "usage": usage, "completed_at": int(time.time())}
        yield self._lifecycle(f"response.{status}")

    def fail(self, message: str, code: str) -> Event:
        self.response |= {"status": "failed", "error": {"code": code, "message": message}}
        return self._lifecycle("response.failed")

    # ---- items

    def _add_text(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        if self._open is None or self._open["type"] != kind:
            extra: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            yield from self._open_item(kind, content=[], **extra)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        more: dict[str, Any] = {"delta": text}
        if kind == "message":
            part["logprobs"] += logprobs
            more["logprobs"] = logprobs
        yield self._event(f"{_TEXT_EVENTS[kind]}.delta", content_index=0, **more)

    def _add_call(self, call: dict[str, Any]) -> Iterator[Event]:
        function = call.get("function") or {}
        if self._open is None or self._open["type"] != "function_call" or self._call_index != call["index"]:
            yield from self._open_item("function_call", call_id=call["id"], name=function["name"], arguments="")
            self._call_index = call["index"]
        assert self._open is not None
        if function.get("arguments"):
            self._open["arguments"] += function["arguments"]
            yield self._event("response.function_call_arguments.delta", delta=function["arguments"])

    def _open_item(self, kind: str, **members: Any) -> Iterator[Event]:
        yield from self._close("completed")
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", **members}
        self._open = item
        self.response["output"].append(item)
        yield self._event("response.output_item.added", item=copy.deepcopy(item))
        if kind in _TEXT_EVENTS:
            part = _empty_part(kind)
            item["content"].append(part)
            yield self._event("response.content_part.added", content_index=0, part=copy.deepcopy(part))

    def _close(self, status: str) -> Iterator[Event]:
        item = self._open
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            yield self._event("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"])
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._event(f"{_TEXT_EVENTS[item['type']]}.done", content_index=0, text=part["text"], **more)
            yield self._event("response.content_part.done", content_index=0, part=copy.deepcopy(part))
        yield self._event("response.output_item.done", item=copy.deepcopy(item))
        self._open = None

    # ---- events

    def _event(self, kind: str, **members: Any) -> Event:
        """An event of the open item."""
        assert self._open is not None
        place = {"output_index": len(self.response["output"]) - 1}
        if "item" not in members:
            place["item_id"] = self._open["id"]
        return self._numbered({"type": kind, **place, **members})

    def _lifecycle(self, kind: str) -> Event:
        return self._numbered({"type": kind, "response": copy.deepcopy(self.response)})

    def _numbered(self, event: Event) -> Event:
        event["sequence_number"] = self._number
        self._number += 1
        return event
