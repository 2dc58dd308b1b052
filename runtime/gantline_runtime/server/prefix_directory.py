"""Which beginnings of prompts the engine has cached, for whoever routes requests: the whole, or what changed since they last asked.

Every API process hears the same changes of the engine and numbers them alike, so that it does not matter which one is asked.
"""

from __future__ import annotations

from collections import deque

from gantline_runtime.engine_messages import PrefixChanges
from gantline_runtime.prompt_prefixes import SCHEME, CachedPrefixes

__all__ = ["PrefixDirectory"]

_MOST_KEPT = 1 << 15
"""Hashes of past changes that are kept; who missed more gets the whole, which is at most twice as much."""


class PrefixDirectory:
    def __init__(self) -> None:
        self._epoch = ""
        self._number = 0
        self._present: set[int] = set()
        self._changes: deque[PrefixChanges] = deque()
        """Without a gap, up to `_number`."""
        self._num_kept = 0

    def apply(self, message: PrefixChanges) -> None:
        """Take what the engine tells, in the order in which it does."""
        if message.whole:
            self._present = set(message.added)
            self._changes.clear()
            self._num_kept = 0
        else:
            self._present.update(message.added)
            self._present.difference_update(message.removed)
            self._changes.append(message)
            self._num_kept += _size(message)
            while self._num_kept > _MOST_KEPT:
                self._num_kept -= _size(self._changes.popleft())
        self._epoch, self._number = message.epoch, message.number

    def since(self, cursor: str) -> CachedPrefixes:
        """The answer to who has `cursor` of an earlier answer: changes where it still tells which, all that there is otherwise."""
        epoch, _, digits = cursor.rpartition(".")
        number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 16 else -1
        oldest = self._number - len(self._changes)
        if epoch != self._epoch or number < oldest:
            return self._answer(self._number, sorted(self._present), [], whole=True)
        changed: dict[int, bool] = {}
        for message in self._changes:
            if message.number > number:
                changed |= dict.fromkeys(message.added, True) | dict.fromkeys(message.removed, False)
        added = [name for name, present in changed.items() if present]
        removed = [name for name, present in changed.items() if not present]
        # Another API process may have heard more already: then there is nothing new, and the cursor stays.
        return self._answer(max(number, self._number), added, removed, whole=False)

    def _answer(self, number: int, added: list[int], removed: list[int], *, whole: bool) -> CachedPrefixes:
        return CachedPrefixes(SCHEME, f"{self._epoch}.{number}", whole, added, removed)


def _size(message: PrefixChanges) -> int:
    """At least 1, so that empty ones are not kept for ever."""
    return 1 + len(message.added) + len(message.removed)
