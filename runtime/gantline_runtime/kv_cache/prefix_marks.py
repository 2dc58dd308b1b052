"""Which beginnings of prompts the cache holds, by the hashes that requests come with (`prompt_prefixes.py`), and what has changed of that.

A request says how many tokens lie before each cut of its prompt's text. The block that ends nearest there carries the cut's hash, for as
long as the prefix cache finds that block. Nothing here happens in a step that fills no block of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator

from gantline_runtime.prompt_prefixes import MOST_TOLD

__all__ = ["PrefixMarks"]

_MOST_PER_BLOCK = 8
"""The same tokens may come of texts that differ, in white space between the members of a tool, say."""


class PrefixMarks:
    """Iterating gives the hashes that some findable block carries."""

    def __init__(self) -> None:
        self._of_block: dict[int, list[int]] = {}
        self._num_blocks: dict[int, int] = {}
        """Of each hash, how many blocks carry it: requests differ in how long their tokens are."""
        self._changed: dict[int, bool] = {}
        """Hashes that came (True) or went since changes were last taken."""

    def __iter__(self) -> Iterator[int]:
        return iter(self._num_blocks)

    def __len__(self) -> int:
        return len(self._num_blocks)

    def add(self, block: int, name: int) -> None:
        """`block`, which is findable, ends near the cut whose hash is `name`. With `MOST_TOLD` known, a new one is not, until others go."""
        names = self._of_block.get(block)
        if (names is not None and name in names) or (name not in self._num_blocks and len(self._num_blocks) >= MOST_TOLD):
            return
        if names is None:
            names = self._of_block[block] = []
        elif len(names) == _MOST_PER_BLOCK:
            self._take(names.pop(0))
        names.append(name)
        count = self._num_blocks.get(name, 0)
        self._num_blocks[name] = count + 1
        if not count:
            self._change(name, True)

    def forget(self, block: int) -> None:
        """`block` is no longer findable."""
        for name in self._of_block.pop(block, ()):
            self._take(name)

    def _take(self, name: int) -> None:
        """One block fewer carries `name`."""
        self._num_blocks[name] -= 1
        if not self._num_blocks[name]:
            del self._num_blocks[name]
            self._change(name, False)

    def _change(self, name: int, present: bool) -> None:
        if self._changed.pop(name, present) == present:  # else it is as it was
            self._changed[name] = present

    def take_changes(self) -> tuple[list[int], list[int]]:
        """(hashes that came, hashes that went) since the last call."""
        changed, self._changed = self._changed, {}
        return [name for name, present in changed.items() if present], [name for name, present in changed.items() if not present]

    def check_integrity(self, known: set[int]) -> None:
        """Assert that only `known` blocks carry hashes, and that they are counted right."""
        assert self._of_block.keys() <= known, f"unknown blocks carry hashes: {self._of_block.keys() - known}"
        counted: dict[int, int] = {}
        for names in self._of_block.values():
            for name in names:
                counted[name] = counted.get(name, 0) + 1
        assert counted == self._num_blocks, "hashes are counted wrong"
