"""What full blocks contain, so that prompts with the same beginning share them.

A block's key is a digest chained over all tokens before it: digest(parent's digest, own tokens). A lookup also compares the
block's own tokens, so that no collision of the digest can ever serve another prompt's keys and values; the parent's were
compared one step earlier in the chain.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b

from gantline_runtime.kv_cache.prefix_marks import PrefixMarks

__all__ = ["PrefixCache", "extend_digests"]

_DIGEST_BYTES = 16


def extend_digests(digests: list[bytes], tokens: array[int], block_size: int) -> None:
    """Append to `digests` those of the full blocks of `tokens` that it lacks."""
    for index in range(len(digests), len(tokens) // block_size):
        parent = digests[-1] if digests else b""
        content = tokens[index * block_size : (index + 1) * block_size].tobytes()
        digests.append(blake2b(parent + content, digest_size=_DIGEST_BYTES).digest())


class PrefixCache:
    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.marks = PrefixMarks()
        self._block_of: dict[bytes, int] = {}
        self._entry_of: dict[int, tuple[bytes, array[int]]] = {}

    def __len__(self) -> int:
        return len(self._entry_of)

    def __contains__(self, block: object) -> bool:
        return block in self._entry_of

    def match(self, digests: Iterable[bytes], tokens: array[int]) -> list[int]:
        """The longest run of known blocks from the beginning of `tokens`."""
        blocks: list[int] = []
        size = self.block_size
        for index, digest in enumerate(digests):
            block = self._block_of.get(digest)
            if block is None or self._entry_of[block][1] != tokens[index * size : (index + 1) * size]:
                break
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes, content: array[int]) -> None:
        """Make a full block findable. Where the same content is known already, the older block stays the one that is found."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._entry_of[block] = (digest, content)

    def mark(self, digest: bytes, name: int) -> None:
        """The prompt's beginning that is called `name` ends near the block of `digest`, if that is findable."""
        block = self._block_of.get(digest)
        if block is not None:
            self.marks.add(block, name)

    def forget(self, block: int) -> None:
        """The block's content is about to be overwritten."""
        digest, _ = self._entry_of.pop(block)
        del self._block_of[digest]
        self.marks.forget(block)

    def known_blocks(self) -> set[int]:
        return set(self._entry_of)

    def check_integrity(self) -> None:
        self.marks.check_integrity(self.known_blocks())
        assert len(self._block_of) == len(self._entry_of), "digests and blocks differ in number"
        for digest, block in self._block_of.items():
            assert self._entry_of[block][0] == digest, f"block {block} is found under another's digest"
