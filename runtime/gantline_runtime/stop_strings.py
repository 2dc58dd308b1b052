"""Finds stop strings in text that arrives piece by piece, and holds back what may be the beginning of one.

Each stop string is matched by its own Knuth-Morris-Pratt automaton, one character at a time, so the result does not depend on how the
text was cut into pieces, and the cost of a character does not depend on the length of the stop strings. The first match to *end* wins;
of several that end with the same character, the longest. What is held back is the longest suffix that begins some stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """State of one text. `stopped` is True, and `matched` the stop string, once one was found; nothing may be fed after that."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` must not contain an empty string (ValueError)."""
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(dict.fromkeys(stops))
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.stopped = False
        self.matched = ""

    @property
    def num_held(self) -> int:
        """Characters held back."""
        return len(self._held)

    def feed(self, piece: str) -> str:
        """The text that may be shown now: all up to the stop string, if one was completed, else all but what may begin one."""
        assert not self.stopped, "text was fed after a stop string"
        if not self._stops:
            return piece
        text = self._held + piece
        for i in range(len(self._held), len(text)):
            matched = self._advance(text[i])
            if matched:
                self.stopped, self._held = True, ""
                self.matched = text[i + 1 - matched : i + 1]
                return text[: i + 1 - matched]
        held = max(self._states)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> int:
        """Take one character into every automaton; the length of the longest stop string that it completes, else 0."""
        longest = 0
        for i, stop in enumerate(self._stops):
            state, failures = self._states[i], self._failures[i]
            while state and stop[state] != char:
                state = failures[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                longest = max(longest, state)
            self._states[i] = state
        return longest


def _failure_table(stop: str) -> list[int]:
    """`table[i]`: length of the longest proper prefix of `stop` that ends at i (Knuth, Morris, Pratt 1977)."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        if stop[i] == stop[length]:
            length += 1
        table[i] = length
    return table
