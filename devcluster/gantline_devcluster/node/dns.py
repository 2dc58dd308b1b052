"""One DNS question, by hand (RFC 1035): enough to know that the cluster's DNS answers."""

from __future__ import annotations

import secrets
import struct

_TYPE_A, _CLASS_IN, _RECURSION_DESIRED, _FAILURE_BITS = 1, 1, 0x0100, 0x000F


def question(name: str) -> bytes:
    """A query for the IPv4 addresses of `name`."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return (
        struct.pack(">HHHHHH", secrets.randbelow(65536), _RECURSION_DESIRED, 1, 0, 0, 0)
        + labels
        + struct.pack(">BHH", 0, _TYPE_A, _CLASS_IN)
    )


def addresses(answer: bytes) -> list[str]:
    """The IPv4 addresses of an answer; none for a failure or an answer that is too short."""
    if len(answer) < 12:
        return []
    _, flags, questions, answers = struct.unpack(">HHHH", answer[:8])
    position, found = 12, []
    try:
        for _ in range(questions):
            position = _after_name(answer, position) + 4
        for _ in range(answers if not flags & _FAILURE_BITS else 0):
            position = _after_name(answer, position)
            kind, _, _, length = struct.unpack(">HHIH", answer[position : position + 10])
            position += 10
            if kind == _TYPE_A and length == 4:
                found.append(".".join(str(octet) for octet in answer[position : position + 4]))
            position += length
    except (IndexError, struct.error):
        return []
    return found


def _after_name(data: bytes, position: int) -> int:
    while data[position]:
        if data[position] >= 0xC0:  # a pointer ends the name
            return position + 2
        position += data[position] + 1
    return position + 1
