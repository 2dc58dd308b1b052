"""The scheduler's view of the cache: match, reserve, publish, release; all by sequence."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from gantline_runtime.kv_cache.block_pool import BlockPool
from gantline_runtime.kv_cache.prefix_cache import PrefixCache, extend_digests
from gantline_runtime.kv_cache.prefix_groups import PrefixGroups
from gantline_runtime.request import Sequence

__all__ = ["CacheManager"]


class CacheManager:
    """Owns the blocks and the block tables.

    `tables` int32 [max_slots, max_blocks] is the host's copy of the device's block tables; `take_table_updates` gives what changed
    since it was last asked, so that only the changes travel.
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, max_slots: int, max_blocks: int, prefix_caching: bool, on_cpu: bool = False
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.prefix_caching = prefix_caching
        self.prefix = PrefixCache(block_size)
        self.pool = BlockPool(num_blocks, on_evict=self.prefix.forget)
        self.tables = np.zeros((max_slots, max_blocks), dtype=np.int32)
        self.groups = PrefixGroups(self.tables, self.pool.refs, block_size, on_cpu=on_cpu)
        self._updates: list[int] = []
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    @property
    def usage(self) -> float:
        """Share of blocks that sequences hold."""
        return 1.0 - self.pool.num_free / self.num_blocks

    @property
    def hit_rate(self) -> float:
        """Share of all prompt tokens asked for that the prefix cache had."""
        return self.num_hit_tokens / self.num_queried_tokens if self.num_queried_tokens else 0.0

    def admit(self, sequence: Sequence, slot: int, *, reserve: int) -> bool:
        """Give the sequence blocks for all its tokens, known ones first, and put it in `slot`.

        Tokens whose rows are needed are left to compute (`Sequence.num_reusable`). False, and nothing changed, unless `reserve` blocks
        would stay free. Sets `num_computed`, and counts the hit the first time.
        """
        known = self._match(sequence)
        needed = -(-sequence.length // self.block_size) - len(known)
        idle = sum(map(self.pool.is_idle, known))
        if self.pool.num_free - idle - needed < reserve:
            return False
        assert not sequence.blocks and not sequence.in_flight, f"{sequence} is admitted while it still holds blocks"
        for block in known:
            self.pool.share(block)
        sequence.slot = slot
        self._append(sequence, known)
        self._append(sequence, [self.pool.allocate() for _ in range(needed)])
        self.groups.admit(slot, sequence.blocks, len(known))
        sequence.num_published = len(known)
        if sequence.marks:
            self._mark(sequence, 0, len(known))
        sequence.num_computed = len(known) * self.block_size
        if not sequence.preempted:
            sequence.num_cached_tokens = sequence.num_computed
            self.num_queried_tokens += sequence.prompt_len
            self.num_hit_tokens += sequence.num_computed
        return True

    def grow(self, sequence: Sequence) -> bool:
        """One more block; False if none is free."""
        if not self.pool.num_free:
            return False
        self._append(sequence, [self.pool.allocate()])
        return True

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Make the full blocks of the first `num_tokens` tokens findable: the tokens are known here, and a step launched before
        any that could read them has written, or will write, their keys and values."""
        if not self.prefix_caching:
            return
        num_full = min(num_tokens // self.block_size, len(sequence.blocks))
        if num_full <= sequence.num_published:
            return
        extend_digests(sequence.digests, sequence.tokens, self.block_size)
        size = self.block_size
        for index in range(sequence.num_published, num_full):
            self.prefix.publish(sequence.blocks[index], sequence.digests[index], sequence.tokens[index * size : (index + 1) * size])
        if sequence.marks:
            self._mark(sequence, sequence.num_published, num_full)
        sequence.num_published = num_full

    def _mark(self, sequence: Sequence, start: int, stop: int) -> None:
        """Note which of the beginnings that the request named end with its blocks `start` to `stop`, which were just published or found."""
        size = self.block_size
        if start * size >= sequence.prompt_len:
            return
        for num_tokens, name in sequence.marks:
            index = (num_tokens + size // 2) // size - 1
            if start <= index < stop:
                self.prefix.mark(sequence.digests[index], name)

    def release(self, sequence: Sequence) -> None:
        """Give up all blocks and the slot. The last block goes first, so that a prefix is evicted from its end."""
        assert not sequence.in_flight, f"{sequence} is released while a step in flight may write its blocks"
        for block in reversed(sequence.blocks):
            self.pool.release(block, keep=block in self.prefix)
        self.groups.release(sequence.slot)
        sequence.blocks = []
        sequence.slot = -1
        sequence.num_published = 0

    def disown(self, sequence: Sequence, start: int) -> set[int]:
        """Make the blocks from token `start` on unfindable: their keys and values were never written, or are of tokens that do not count.
        Returns those blocks."""
        lost = set(sequence.blocks[start // self.block_size :])
        for block in lost & self.prefix.known_blocks():
            self.prefix.forget(block)
        sequence.num_published = min(sequence.num_published, start // self.block_size)
        return lost

    def resend_table(self, sequence: Sequence) -> None:
        """Have the next table updates hold all of a sequence's blocks: the device may have missed some."""
        first = sequence.slot * self.tables.shape[1]
        for place, block in enumerate(sequence.blocks, first):
            self._updates += (place, block)

    def num_exclusive(self, sequence: Sequence) -> int:
        """Blocks that only this sequence holds: what preempting it would free."""
        return sum(self.pool.refs[block] == 1 for block in sequence.blocks)

    def clear_prefixes(self) -> None:
        """Forget every block that nobody holds."""
        for block in self.pool.forget_evictable():
            self.prefix.forget(block)

    def take_table_updates(self) -> list[int]:
        """Pairs of place (in `tables`, flattened) and block, one after the other; the caller applies them to the device's tables."""
        updates, self._updates = self._updates, []
        return updates

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert every invariant; `sequences` are all that may hold blocks."""
        self.prefix.check_integrity()
        self.groups.check_integrity()
        sequences = list(sequences)
        self.pool.check_integrity([b for s in sequences for b in s.blocks], self.prefix.known_blocks())
        for sequence in sequences:
            assert len(set(sequence.blocks)) == len(sequence.blocks), f"{sequence} holds a block twice"
            if sequence.slot >= 0:
                assert self.tables[sequence.slot, : len(sequence.blocks)].tolist() == sequence.blocks, f"{sequence}: the table differs"
        slots = [s.slot for s in sequences if s.slot >= 0]
        assert len(set(slots)) == len(slots), "two sequences share a slot"

    def _match(self, sequence: Sequence) -> list[int]:
        if not self.prefix_caching:
            return []
        extend_digests(sequence.digests, sequence.tokens, self.block_size)
        usable = sequence.num_reusable // self.block_size
        return self.prefix.match(sequence.digests[:usable], sequence.tokens)

    def _append(self, sequence: Sequence, blocks: list[int]) -> None:
        start, slot = len(sequence.blocks), sequence.slot
        sequence.blocks.extend(blocks)
        self.tables[slot, start : start + len(blocks)] = blocks
        for place, block in enumerate(blocks, slot * self.tables.shape[1] + start):
            self._updates += (place, block)
