"""Finding markers in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["held_back", "split_at_marker"]


def split_at_marker(text: str, markers: Sequence[str]) -> tuple[str, str, str] | None:
    """(before, marker, after) at the first marker in `text`, the longest of those that begin there; None if there is none."""
    found = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker)) >= 0]
    if not found:
        return None
    at, _, marker = min(found)
    return text[:at], marker, text[at + len(marker) :]


def held_back(text: str, markers: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the beginning of a marker."""
    longest = max((len(marker) - 1 for marker in markers), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        end = text[len(text) - size :]
        if any(marker.startswith(end) for marker in markers):
            return size
    return 0
