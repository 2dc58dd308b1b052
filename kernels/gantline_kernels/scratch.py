"""Memory that launches hand on to each other: counters that are zero before a launch and after it, sums beside them.

Launches of one stream follow each other, and so must replays of graphs; each stream has its memory, and all graphs of a device together
one. It is never made while a graph is captured: its place would be one that earlier graphs write to, and its zeros one graph's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["kept"]

Memory = TypeVar("Memory")

_CAPTURED = -1
_memory: dict[tuple[Callable[[int], Any], int, int], Any] = {}
"""By what makes it, and the device's index and stream, or _CAPTURED."""


def kept(make: Callable[[int], Memory], index: int, stream: int) -> Memory:
    """What `make(index)` made for `stream` of the device `index`, or for all graphs if one is being captured.

    Raises RuntimeError if a device's first call is captured in a graph.
    """
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing:
        for owner in (_CAPTURED, stream):
            if (make, index, owner) not in _memory:
                _memory[make, index, owner] = make(index)
    elif (make, index, _CAPTURED) not in _memory:
        raise RuntimeError("a kernel with scratch memory must have run once before it is captured in a CUDA graph")
    memory: Memory = _memory[make, index, _CAPTURED if capturing else stream]
    return memory
