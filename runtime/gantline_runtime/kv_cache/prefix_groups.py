"""Which running sequences begin with the same blocks, so that attention can read those once for all of them.

The running sequences' lists of blocks form a tree: they part where they differ. A *branch* is a beginning that ends at such a place and
that two sequences or more hold; it is named by its last block. Each newcomer creates one at most, where it parts from all others: at the
last of the blocks that it was given from the prefix cache and that another sequence holds too. Branches change only when sequences come and
go, so a step pays for a few operations on arrays, whatever the prefixes' length.

Of the branches that a sequence is on, it is attended in the one that saves most, if what the whole step saves is worth it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_SAVING", "MAX_GROUPS", "Grouping", "PrefixGroups", "num_groups"]

Words = NDArray[np.int32]

MAX_GROUPS = 16
"""Most groups of a step; the ones that save most are taken."""
LEAST_SAVING = 8 * 1024
"""Tokens that all groups of a step must save from being read again, to be worth the launches. Measured, docs/perf-log.md."""
LEAST_SAVING_ON_CPU = 1024
"""There nothing is launched, and what is read again is copied again."""
_MAX_BRANCHES = 8
"""Branches noted for a sequence; it is not in any further ones."""


def num_groups(num_decodes: int) -> int:
    """Most groups of so many sequences: what their number is padded to."""
    return min(MAX_GROUPS, num_decodes // 2)


class Grouping(NamedTuple):
    """Groups among the sequences of a step; as `gantline_kernels.api.SharedPrefixes`, on the host."""

    lens: Words
    """Tokens that each sequence shares with its group; 0: it is in none."""
    members: Words
    """Numbers of the sequences that are in a group, group by group."""
    starts: Words
    """Where each group begins in `members`, and where the last one ends."""


class PrefixGroups:
    def __init__(self, tables: Words, refs: list[int], block_size: int, *, on_cpu: bool) -> None:
        """`tables` [max_slots, max_blocks] and `refs` (holders of each block) are the cache manager's, and are read only."""
        self._tables = tables
        self._refs = refs
        self._block_size = block_size
        self._on_cpu = on_cpu
        max_slots = len(tables)
        self._held: list[list[int]] = [[] for _ in range(max_slots)]
        """The blocks of the sequence in each slot; past them its table may be an earlier one's."""
        self._branches = np.zeros((max_slots, _MAX_BRANCHES), dtype=np.int32)
        """Of each slot the branches that it is on, in any order; 0: no branch."""
        self._of_block: dict[int, int] = {}
        self._last_block = np.zeros(max_slots + 1, dtype=np.int32)
        self._num_blocks = np.zeros(max_slots + 1, dtype=np.int32)
        self._count = np.zeros(max_slots + 1, dtype=np.int32)
        self._free = list(range(max_slots, 0, -1))
        self.num_saved_tokens = 0
        """Tokens of contexts that groups did not read again, so far."""

    def admit(self, slot: int, blocks: list[int], num_known: int) -> None:
        """A sequence has come to `slot` and holds `blocks` (the list that will grow), the first `num_known` from the prefix cache."""
        self._held[slot] = blocks
        depth = num_known
        while depth and self._refs[blocks[depth - 1]] < 2:
            depth -= 1
        mine = [branch for block in blocks[:depth] if (branch := self._of_block.get(block))][-_MAX_BRANCHES:]
        self._branches[slot, : len(mine)] = mine
        self._count[mine] += 1
        if depth and blocks[depth - 1] not in self._of_block:
            self._create(blocks[depth - 1], depth)

    def _create(self, block: int, depth: int) -> None:
        found = np.flatnonzero(self._tables[:, depth - 1] == block)
        room = (self._branches[found] == 0).any(axis=1)
        holders = np.array([slot for slot in found[room].tolist() if len(self._held[slot]) >= depth], dtype=np.int32)
        if len(holders) < 2 or not self._free:
            return
        branch = self._free.pop()
        self._of_block[block] = branch
        self._last_block[branch], self._num_blocks[branch], self._count[branch] = block, depth, len(holders)
        self._branches[holders, (self._branches[holders] == 0).argmax(axis=1)] = branch

    def release(self, slot: int) -> None:
        """The sequence has left `slot`."""
        mine = self._branches[slot][self._branches[slot] > 0]
        self._branches[slot] = 0
        self._held[slot] = []
        self._count[mine] -= 1
        for branch in mine[self._count[mine] < 2].tolist():
            self._branches[self._branches == branch] = 0
            self._count[branch] = 0
            del self._of_block[int(self._last_block[branch])]
            self._free.append(branch)

    def group(self, slots: Words) -> Grouping | None:
        """Groups among the sequences in `slots`, which are about to attend with one query each; None where none is worth it."""
        if not self._of_block or len(slots) < 2:
            return None
        share = self._num_blocks * (1.0 - 1.0 / np.maximum(self._count, 1))
        choices = self._branches[slots]
        chosen = choices[np.arange(len(slots)), share[choices].argmax(axis=1)]
        counts = np.bincount(chosen, minlength=len(self._count))
        counts[0] = 0
        saving = (counts - 1) * self._num_blocks * self._block_size
        groups = np.flatnonzero(saving > 0)
        groups = groups[np.argsort(-saving[groups], kind="stable")][: num_groups(len(slots))]
        saved_tokens = int(saving[groups].sum())
        if saved_tokens < max(1, LEAST_SAVING_ON_CPU if self._on_cpu else LEAST_SAVING):
            return None
        self.num_saved_tokens += saved_tokens
        rank = np.zeros(len(counts), dtype=np.int32)
        rank[groups] = np.arange(1, len(groups) + 1)
        group = rank[chosen]
        members = np.argsort(group, kind="stable")[np.count_nonzero(group == 0) :].astype(np.int32)
        starts = np.zeros(len(groups) + 1, dtype=np.int32)
        np.cumsum(counts[groups], out=starts[1:])
        lens = np.where(group > 0, self._num_blocks[chosen] * self._block_size, 0).astype(np.int32)
        return Grouping(lens, members, starts)

    def check_integrity(self) -> None:
        """Assert that every branch is what its members' tables begin with."""
        assert sorted([*self._of_block.values(), *self._free]) == list(range(1, len(self._count))), "a branch is lost or in two hands"
        assert not self._branches[[not held for held in self._held]].any(), "an empty slot is on a branch"
        for block, branch in self._of_block.items():
            slots, columns = np.nonzero(self._branches == branch)
            assert len(slots) == len(set(slots)) == self._count[branch] >= 2, f"the branch at block {block} has {columns} members"
            ends = {self._held[slot][self._num_blocks[branch] - 1] for slot in slots}
            assert ends == {block}, f"a member does not hold block {block}"
