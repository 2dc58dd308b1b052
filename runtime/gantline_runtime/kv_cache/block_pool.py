"""Fixed-size blocks with reference counts.

A block is in exactly one of three states:

    empty       nobody holds it, its content is nothing          -> handed out first
    held        `refs[block] >= 1`
    evictable   nobody holds it, but the prefix cache knows it   -> handed out when no empty one is left, least recently used first
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

__all__ = ["BlockPool"]


class BlockPool:
    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        """`on_evict(block)` is called when an evictable block is about to be handed out: its content is no longer to be found."""
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self._on_evict = on_evict
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._empty) + len(self._evictable)

    def allocate(self) -> int:
        """A block with one reference, its content undefined. The caller has made sure that `num_free` is not 0."""
        if self._empty:
            block = self._empty.pop()
        else:
            assert self._evictable, "allocate() without a free block"
            block, _ = self._evictable.popitem(last=False)
            self._on_evict(block)
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a block that is held or evictable."""
        if self.refs[block] == 0:
            del self._evictable[block]
        self.refs[block] += 1

    def is_idle(self, block: int) -> bool:
        """Whether nobody holds the block (sharing it takes it from the free ones)."""
        return self.refs[block] == 0

    def release(self, block: int, *, keep: bool) -> None:
        """One holder fewer. The last one leaves it evictable if `keep` (the prefix cache knows its content), else empty."""
        assert self.refs[block] > 0, f"block {block} is released more often than it was held"
        self.refs[block] -= 1
        if self.refs[block]:
            return
        if keep:
            self._evictable[block] = None
        else:
            self._empty.append(block)

    def forget_evictable(self) -> list[int]:
        """Make every evictable block empty; returns them."""
        blocks = list(self._evictable)
        self._evictable.clear()
        self._empty.extend(blocks)
        return blocks

    def check_integrity(self, held: Iterable[int], known: set[int]) -> None:
        """Assert that each block is in one state only, that `held` (a block once for each holder) explains all references, and that
        evictable blocks are `known` to the prefix cache while empty ones are not."""
        expected = [0] * self.num_blocks
        for block in held:
            expected[block] += 1
        assert expected == self.refs, (
            f"references differ: {[(b, r, e) for b, (r, e) in enumerate(zip(self.refs, expected, strict=True)) if r != e]}"
        )
        empty, evictable = set(self._empty), set(self._evictable)
        assert len(empty) == len(self._empty), "a block is empty twice"
        assert not empty & evictable, "a block is both empty and evictable"
        idle = {b for b, r in enumerate(self.refs) if r == 0}
        assert empty | evictable == idle, f"lost or doubly used blocks: {(empty | evictable) ^ idle}"
        assert evictable <= known, f"evictable but unknown: {evictable - known}"
        assert not empty & known, f"empty but known: {empty & known}"
