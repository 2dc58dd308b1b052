"""Blocks, their references, and the prefixes that they remember."""

from __future__ import annotations

from array import array

import pytest
from gantline_runtime.kv_cache import BlockPool, CacheManager, PrefixCache
from gantline_runtime.kv_cache.prefix_cache import extend_digests
from gantline_runtime.messages import EngineRequest, SamplingParams
from gantline_runtime.request import Sequence

SIZE = 4


def sequence(tokens: list[int], name: str = "a") -> Sequence:
    request = EngineRequest(request_id=name, prompt_ids=tokens, sampling=SamplingParams())
    return Sequence(request, arrival=0, session_len=1024, eos_token_ids=())


def manager(num_blocks: int = 8, **settings: bool) -> CacheManager:
    return CacheManager(
        num_blocks=num_blocks, block_size=SIZE, max_slots=4, max_blocks=16, prefix_caching=settings.get("prefix_caching", True)
    )


def test_the_least_recently_used_block_is_evicted_first_and_empty_ones_before_it() -> None:
    evicted: list[int] = []
    pool = BlockPool(3, on_evict=evicted.append)
    blocks = [pool.allocate() for _ in range(3)]
    pool.release(blocks[1], keep=True)
    pool.release(blocks[0], keep=True)
    pool.release(blocks[2], keep=False)
    assert [pool.allocate() for _ in range(3)] == [blocks[2], blocks[1], blocks[0]]
    assert evicted == [blocks[1], blocks[0]]


def test_sharing_an_evictable_block_takes_it_from_the_free_ones() -> None:
    pool = BlockPool(2, on_evict=lambda _: None)
    block = pool.allocate()
    pool.release(block, keep=True)
    assert pool.num_free == 2
    pool.share(block)
    assert pool.num_free == 1
    pool.share(block)
    pool.release(block, keep=True)
    assert pool.num_free == 1, "one holder is left"
    pool.release(block, keep=True)
    assert pool.num_free == 2


def test_a_block_cannot_be_released_twice() -> None:
    pool = BlockPool(1, on_evict=lambda _: None)
    block = pool.allocate()
    pool.release(block, keep=False)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(block, keep=False)


def test_integrity_notices_a_lost_block_a_wrong_count_and_an_unknown_one() -> None:
    pool = BlockPool(3, on_evict=lambda _: None)
    block = pool.allocate()
    pool.check_integrity([block], set())
    with pytest.raises(AssertionError, match="references differ"):
        pool.check_integrity([], set())
    pool.release(block, keep=True)
    with pytest.raises(AssertionError, match="unknown"):
        pool.check_integrity([], set())
    pool.check_integrity([], {block})


def test_a_prefix_matches_up_to_the_first_block_that_differs() -> None:
    cache = PrefixCache(SIZE)
    tokens = array("i", range(12))
    digests: list[bytes] = []
    extend_digests(digests, tokens, SIZE)
    for block, digest in enumerate(digests):
        cache.publish(block, digest, tokens[block * SIZE : (block + 1) * SIZE])
    other = array("i", [*range(6), 99, 7, *range(8, 12)])
    other_digests: list[bytes] = []
    extend_digests(other_digests, other, SIZE)
    assert cache.match(digests, tokens) == [0, 1, 2]
    assert cache.match(other_digests, other) == [0], "the third block's own tokens agree, but not what comes before it"


def test_a_colliding_digest_never_serves_other_tokens() -> None:
    cache = PrefixCache(SIZE)
    cache.publish(5, b"same", array("i", [1, 2, 3, 4]))
    assert cache.match([b"same"], array("i", [1, 2, 3, 4])) == [5]
    assert cache.match([b"same"], array("i", [1, 2, 3, 5])) == []


def test_of_two_blocks_with_one_content_the_older_is_found_and_the_newer_becomes_empty() -> None:
    cache = manager()
    first, second = sequence(list(range(8)), "a"), sequence(list(range(8)), "b")
    assert cache.admit(first, 0, reserve=0)
    assert cache.admit(second, 1, reserve=0), "admitted before the first one's blocks were published"
    cache.publish(first, 8)
    cache.publish(second, 8)
    cache.check_integrity([first, second])
    cache.release(second)
    cache.check_integrity([first])
    cache.release(first)
    cache.check_integrity([])
    assert len(cache.prefix) == 2
    assert cache.num_free == 8


def test_admission_counts_idle_blocks_of_the_prefix_as_taken() -> None:
    cache = manager(num_blocks=4)
    first = sequence(list(range(9)))
    assert cache.admit(first, 0, reserve=0)
    cache.publish(first, 9)
    cache.release(first)
    assert cache.num_free == 4
    second = sequence(list(range(16)))
    assert not cache.admit(second, 0, reserve=1)
    assert not second.blocks
    assert cache.admit(second, 0, reserve=0)
    assert (second.num_computed, second.num_cached_tokens, cache.num_free) == (8, 8, 0)
    cache.check_integrity([second])


def test_an_evicted_block_is_forgotten_and_a_chain_is_evicted_from_its_end() -> None:
    cache = manager(num_blocks=4)
    first = sequence(list(range(17))[:16])
    assert cache.admit(first, 0, reserve=0)
    cache.publish(first, 16)
    cache.release(first)
    other = sequence([99, 98, 97, 96, 95])
    assert cache.admit(other, 0, reserve=0)
    cache.check_integrity([other])
    again = sequence(list(range(16)), "again")
    cache.release(other)
    assert cache.admit(again, 0, reserve=0)
    assert again.num_computed == 8, "the first half of the chain has survived"


def test_only_changed_entries_of_the_tables_are_told_once() -> None:
    cache = manager()
    one = sequence(list(range(6)))
    assert cache.admit(one, 2, reserve=0)
    assert cache.take_table_updates() == [2 * 16, one.blocks[0], 2 * 16 + 1, one.blocks[1]]
    assert cache.take_table_updates() == []
    assert cache.grow(one)
    assert cache.take_table_updates() == [2 * 16 + 2, one.blocks[2]]
    assert cache.tables[2, :3].tolist() == one.blocks


def test_clearing_forgets_what_nobody_holds() -> None:
    cache = manager()
    held, gone = sequence([1] * 8, "held"), sequence([2] * 8, "gone")
    for slot, item in enumerate((held, gone)):
        assert cache.admit(item, slot, reserve=0)
        cache.publish(item, 8)
    cache.release(gone)
    cache.clear_prefixes()
    cache.check_integrity([held])
    assert len(cache.prefix) == 2


def test_the_hit_rate_counts_prompt_tokens_and_not_those_computed_again_after_a_preemption() -> None:
    cache = manager()
    first = sequence(list(range(8)))
    assert cache.admit(first, 0, reserve=0)
    cache.publish(first, 8)
    cache.release(first)
    first.preempted = True
    first.num_computed = 0
    assert cache.admit(first, 0, reserve=0)
    assert (cache.num_queried_tokens, cache.num_hit_tokens) == (8, 0)
    second = sequence(list(range(8)), "b")
    assert cache.admit(second, 1, reserve=0)
    assert cache.hit_rate == 4 / 16
