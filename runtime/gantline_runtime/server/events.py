"""What a stream of server-sent events is made of; `sse.py` sends them."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["DONE", "ClientLeft", "encode_event"]

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
_UNICODE_LINE_ENDS = tuple((char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029")


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


def encode_event(body: Any, *, name: str | None = None) -> bytes:
    """One event, with a name if it has one. Three characters that Unicode calls line ends are escaped: some clients split a stream's text
    there, in mid-event."""
    data = _encode(body)
    for raw, escaped in _UNICODE_LINE_ENDS:
        data = data.replace(raw, escaped)
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + data + b"\n\n"
