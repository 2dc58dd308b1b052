"""Which running sequences are attended together, through the cache manager that tells who holds what."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from gantline_runtime.kv_cache import CacheManager, prefix_groups
from gantline_runtime.kv_cache.prefix_groups import Grouping
from gantline_runtime.messages import EngineRequest, SamplingParams
from gantline_runtime.request import Sequence

SIZE = 16


@pytest.fixture(autouse=True)
def _every_saving_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_groups, "LEAST_SAVING", 1)


class Running:
    """Sequences in slots, their blocks published when they are admitted, if nothing else is said."""

    def __init__(self, *, max_slots: int = 8, num_blocks: int = 200, max_blocks: int = 40) -> None:
        self.cache = CacheManager(num_blocks=num_blocks, block_size=SIZE, max_slots=max_slots, max_blocks=max_blocks, prefix_caching=True)
        self.held: dict[int, Sequence] = {}
        self._next = 0

    def admit(self, *parts: int, publish: int | None = None) -> int:
        """A prompt of one block for each of `parts` (equal numbers: equal tokens) and five tokens that nobody else has; its slot."""
        self._next += 1
        prompt = [1000 + part for part in parts for _ in range(SIZE)] + [2000 + self._next] * 5
        request = EngineRequest(request_id=str(self._next), prompt_ids=prompt, sampling=SamplingParams())
        sequence = Sequence(request, arrival=self._next, session_len=10_000, eos_token_ids=())
        slot = next(i for i in range(len(self.cache.tables)) if i not in self.held)
        assert self.cache.admit(sequence, slot, reserve=0)
        self.held[slot] = sequence
        self.publish(slot, len(parts) if publish is None else publish)
        return slot

    def publish(self, slot: int, blocks: int) -> None:
        self.cache.publish(self.held[slot], blocks * SIZE)

    def release(self, slot: int) -> None:
        self.cache.release(self.held.pop(slot))

    def group(self, slots: list[int] | None = None) -> list[tuple[list[int], int]]:
        """(slots, shared blocks) of each group, of the running sequences or some of them; checked against the tables."""
        self.cache.check_integrity(self.held.values())
        used = sorted(self.held) if slots is None else slots
        grouping = self.cache.groups.group(np.array(used, dtype=np.int32))
        return [] if grouping is None else self._read(grouping, used)

    def _read(self, grouping: Grouping, slots: list[int]) -> list[tuple[list[int], int]]:
        groups = []
        assert sorted(grouping.members) == np.flatnonzero(grouping.lens).tolist()
        for start, end in zip(grouping.starts[:-1], grouping.starts[1:], strict=True):
            members = [slots[i] for i in grouping.members[start:end]]
            (length,) = {int(grouping.lens[i]) for i in grouping.members[start:end]}
            assert len(set(self.cache.tables[members, length // SIZE - 1])) == 1, "members that do not share their last block"
            assert len({tuple(self.held[slot].tokens[:length]) for slot in members}) == 1, "members whose prefixes differ"
            assert all(length < len(self.held[slot].tokens) for slot in members), "nothing would be left for a sequence's own"
            groups.append((members, length // SIZE))
        return groups


def test_sequences_that_begin_alike_are_a_group_and_others_are_in_none() -> None:
    running = Running()
    first, other, second, third = running.admit(1, 2, 3), running.admit(9), running.admit(1, 2, 3), running.admit(1, 2, 3, 4)
    assert running.group() == [([first, second, third], 3)]
    assert running.group([other, third, first]) == [([third, first], 3)]
    assert running.group([other, third]) == []


def test_a_group_ends_with_its_last_but_one_member_and_begins_anew() -> None:
    running = Running()
    first, second = running.admit(1, 2), running.admit(1, 2)
    running.release(first)
    assert running.group() == []
    again = running.admit(1, 2)
    assert running.group() == [([again, second], 2)]
    running.release(second)
    running.release(again)
    assert running.group() == []


def test_several_prefixes_at_once_are_several_groups_and_the_ones_that_save_most_come_first() -> None:
    running = Running()
    a, b = [running.admit(1), running.admit(1)], [running.admit(2, 3, 4), running.admit(2, 3, 4)]
    assert running.group() == [(b, 3), (a, 1)]


def test_of_a_long_prefix_of_few_and_a_short_one_of_many_each_takes_what_saves_it_most() -> None:
    running = Running()
    header = (1, 2, 3, 4)
    many = [running.admit(*header, 10 + i) for i in range(4)]
    assert running.group() == [(many, 4)]
    few = [running.admit(*header, 20, 21, 22, 23, 24, 25) for _ in range(3)]
    assert running.group() == [(few, 10), (many, 4)]
    running.release(few[2])
    assert running.group() == [(many, 4), (few[:2], 10)]
    running.release(few[1])
    assert running.group() == [([*many, few[0]], 4)]


def test_a_sequence_whose_prefix_is_cached_but_held_by_nobody_else_is_in_no_group() -> None:
    running = Running()
    running.release(running.admit(1, 2, 3))
    running.admit(1, 2, 3)
    assert running.group() == []


def test_a_newcomer_that_shares_less_splits_off_earlier() -> None:
    running = Running()
    deep = [running.admit(1, 2, 3, 4, 5, 6) for _ in range(2)]
    early = running.admit(1, 2)
    assert running.group() == [(deep, 6)]
    running.release(deep[0])
    assert running.group() == [([deep[1], early], 2)]


def test_groups_that_save_too_little_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running()
    pair = [running.admit(1, 2), running.admit(1, 2)]
    monkeypatch.setattr(prefix_groups, "LEAST_SAVING", 2 * SIZE + 1)
    assert running.group() == []
    third = running.admit(1, 2)
    assert running.group() == [([*pair, third], 2)]


def test_no_more_groups_are_made_than_a_batch_of_that_size_is_padded_to() -> None:
    running = Running(max_slots=100, num_blocks=1000)
    for prefix in range(40):
        for _ in range(2):
            running.admit(100 + prefix)
    assert len(running.group()) == prefix_groups.MAX_GROUPS == prefix_groups.num_groups(80)
    assert len(running.group([0, 1, 2, 3])) == prefix_groups.num_groups(4) == 2
    assert running.group([0]) == []


@pytest.mark.parametrize("seed", range(5))
def test_random_comings_and_goings_keep_every_group_true(seed: int) -> None:
    rng = random.Random(seed)
    running = Running(max_slots=12, num_blocks=100)
    grouped = 0
    for _ in range(400):
        if len(running.held) < 12 and rng.random() < 0.55:
            running.admit(*(rng.randrange(2) for _ in range(rng.randrange(7))))
        elif running.held:
            running.release(rng.choice(sorted(running.held)))
        grouped += bool(running.group())
    assert grouped > 100
    for slot in list(running.held):
        running.release(slot)
    assert running.group() == []


def test_two_copies_of_one_content_make_a_group_of_those_who_hold_the_same_last_block() -> None:
    running = Running()
    first, second = running.admit(1, 2, publish=0), running.admit(1, 2, publish=0)
    assert running.group() == []
    running.publish(first, 1)
    running.publish(second, 2)
    third = running.admit(1, 2)
    assert running.cache.tables[third, :2].tolist() == [running.cache.tables[first, 0], running.cache.tables[second, 1]]
    assert running.group() == [([second, third], 2)]
    running.release(second)
    assert running.group() == []


def test_grouping_256_sequences_takes_less_than_a_fifth_of_a_millisecond() -> None:
    running = Running(max_slots=257, num_blocks=4000, max_blocks=64)
    for i in range(256):
        running.admit(*range(32) if i % 2 else range(100, 116))
    slots = np.arange(256, dtype=np.int32)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        assert running.cache.groups.group(slots) is not None
        times.append(time.perf_counter() - started)
    assert min(times) < 0.2e-3, f"{min(times) * 1e6:.0f} us"
