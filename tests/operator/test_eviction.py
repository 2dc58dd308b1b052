"""What goes from a full cache volume, and the note that keeps use and eviction apart: tables, and properties over all of them."""

from __future__ import annotations

import json

import pytest
from gantline_operator.cache_keeping import read_contents, read_eviction
from gantline_operator.cache_ledger import MAX_ENTRIES, Entry, Ledger, parse, render
from gantline_operator.eviction import Room, artefacts_of_pods, plan_eviction
from gantline_runtime.termination import Reason, TerminationMessage
from hypothesis import given
from hypothesis import strategies as st


def entry(size: int, used: str = "", *users: str, made: bool = True) -> Entry:
    return Entry(bytes=size, made=made, used=used, users=frozenset(users))


OLD, NEW, BUSY = entry(10, "2026-01-01"), entry(20, "2026-02-01"), entry(40, "2025-01-01", "chat.1")
VOLUME = Ledger({"fetch-old": OLD, "fetch-new": NEW, "awq-busy": BUSY})


@pytest.mark.parametrize(
    ("needed", "limit", "protected", "expected"),
    [
        (30, 100, (), Room(in_use_bytes=40)),
        (31, 100, (), Room(evict=("fetch-old",), in_use_bytes=40)),
        (40, 100, (), Room(evict=("fetch-old",), in_use_bytes=40)),
        (45, 100, (), Room(evict=("fetch-new",), in_use_bytes=40)),  # the older one alone is too little, and then not needed
        (60, 100, (), Room(evict=("fetch-new", "fetch-old"), in_use_bytes=40)),
        (61, 100, (), Room(missing_bytes=1, in_use_bytes=40)),
        (35, 100, ("fetch-old",), Room(evict=("fetch-new",), in_use_bytes=50)),
        (60, 100, ("fetch-old",), Room(missing_bytes=10, in_use_bytes=50)),
        (15, None, (), Room(evict=("fetch-new",), in_use_bytes=40)),
        (50, None, (), Room(missing_bytes=20, in_use_bytes=40)),
    ],
)
def test_the_longest_unused_goes_first_and_no_more_than_is_needed(
    needed: int, limit: int | None, protected: tuple[str, ...], expected: Room
) -> None:
    assert plan_eviction(VOLUME, "fetch-x", needed, limit, protected) == expected


def test_what_was_there_of_the_target_itself_takes_no_room_twice() -> None:
    assert plan_eviction(VOLUME, "fetch-new", 50, 100, ()) == Room(in_use_bytes=40)


names = st.sampled_from([f"fetch-{number:010x}" for number in range(12)])
entries = st.builds(
    Entry,
    bytes=st.integers(0, 100),
    made=st.booleans(),
    used=st.sampled_from(["", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]),
    users=st.frozensets(st.sampled_from(["a.1", "b.2"]), max_size=2),
    maker=st.sampled_from(["", "a.1"]),
)
ledgers = st.builds(Ledger, entries=st.dictionaries(names, entries, max_size=12))


@given(ledgers, names, st.integers(0, 300), st.none() | st.integers(0, 900), st.frozensets(names, max_size=4))
def test_nothing_in_use_goes_enough_goes_and_nothing_that_could_stay(
    ledger: Ledger, target: str, needed: int, limit: int | None, protected: frozenset[str]
) -> None:
    room = plan_eviction(ledger, target, needed, limit, protected)
    others = {name: item for name, item in ledger.entries.items() if name != target}
    excess = needed if limit is None else sum(item.bytes for item in others.values()) + needed - limit
    assert target not in room.evict and not protected & set(room.evict)
    assert not any(ledger.entries[name].users for name in room.evict)
    freed = sum(ledger.entries[name].bytes for name in room.evict)
    assert room.missing_bytes or freed >= excess
    assert all(freed - ledger.entries[name].bytes < excess for name in room.evict), "each that goes is needed"
    if room.missing_bytes:
        free = [item.bytes for name, item in others.items() if not item.users and name not in protected]
        assert not room.evict and sum(free) + room.missing_bytes == excess


@given(ledgers)
def test_a_note_reads_as_it_was_written(ledger: Ledger) -> None:
    noted = ledger.begin_eviction(["fetch-0000000001"], "a.1", "now")
    assert parse(render(noted)) == noted
    assert parse(render(noted.end_eviction(["fetch-0000000001"], "later"))).is_going("fetch-0000000001") is False
    stamped = noted.of_claim("uid").discover({"fetch-0000000002": 1}, {}, "later")
    assert parse(render(stamped)) == stamped and (stamped.claim, stamped.looked) == ("uid", "later")


@pytest.mark.parametrize(
    "text",
    [
        None, "", "no json", "[]", '{"artefacts": 3}', '{"artefacts": {"a": {"bytes": -1}}}', '{"artefacts": {"a": {"users": "x"}}}',
        '{"artefacts": {}, "evicting": {"names": "x"}}', json.dumps({"artefacts": {"a" * 200: {}}}), "x" * (1 << 18),
    ],
)  # fmt: skip
def test_a_note_that_nobody_of_ours_wrote_says_nothing(text: str | None) -> None:
    assert parse(text) == Ledger()


def test_use_goes_before_eviction_and_eviction_before_use() -> None:
    held = VOLUME.use("chat.1", "fetch-old", "now", bytes=0)
    assert plan_eviction(held, "x", 60, 100, ()).evict == ()
    going = VOLUME.begin_eviction(["fetch-old"], "chat.1", "now")
    assert going.is_going("fetch-old") and not going.is_going("fetch-new")
    after = going.end_eviction(["fetch-old", "awq-busy"], "later")
    assert after.has("fetch-old") is False and after.has("awq-busy"), "only what was to go is gone, whatever the Job says"
    assert after.use("chat.1", "fetch-old", "again", bytes=7).make("chat.1", "fetch-old").made("fetch-old", 9, {}).has("fetch-old")


def test_what_nobody_noted_is_noted_once_it_is_found_and_goes_first() -> None:
    found = VOLUME.discover({"fetch-lost": 25, "fetch-old": 999}, {"awq-half": 15, "fetch-new": 999, "fetch-lost": 1}, "now")
    assert found.entries == {**VOLUME.entries, "fetch-lost": entry(25), "awq-half": entry(15, made=False)}
    assert found.has("fetch-lost") is True and found.has("awq-half") is False, "half of a model cannot be used"
    assert plan_eviction(found, "x", 30, 110, ()).evict == ("awq-half", "fetch-lost")
    evicted = Ledger(gone={"fetch-lost": "before"}).discover({"fetch-lost": 25}, {}, "now")
    assert evicted.has("fetch-lost") and not evicted.gone


def test_a_note_of_another_claim_tells_nothing_and_one_of_an_earlier_release_is_this_claims() -> None:
    assert VOLUME.of_claim("uid") == Ledger(VOLUME.entries, claim="uid") == VOLUME.of_claim("uid").of_claim("uid")
    assert VOLUME.of_claim("uid").begin_eviction(["fetch-old"], "chat.1", "now").of_claim("other") == Ledger(claim="other")


def test_services_that_are_no_more_use_nothing_and_their_models_count_as_used_until_now() -> None:
    after = VOLUME.without(["chat.1"], "now")
    assert after.entries["awq-busy"] == entry(40, "now")
    assert plan_eviction(after, "x", 60, 100, ()).evict == ("fetch-new", "fetch-old")


def test_a_note_stays_small_and_forgets_the_unused_first() -> None:
    ledger = Ledger().use("chat.1", "kept", "0", bytes=1, made=True)
    for number in range(2 * MAX_ENTRIES):
        ledger = ledger.use("x.1", f"fetch-{number:010x}", f"{number:06}", bytes=1).keep_only("x.1", (), f"{number:06}")
    assert len(ledger.entries) == MAX_ENTRIES and "kept" in ledger.entries
    assert f"fetch-{2 * MAX_ENTRIES - 1:010x}" in ledger.entries


def test_pods_protect_what_they_serve_read_and_make_until_they_end() -> None:
    def pod(phase: str, *arguments: str) -> dict[str, object]:
        return {"spec": {"containers": [{"args": list(arguments)}]}, "status": {"phase": phase}}

    pods = [
        pod("Running", "serve", "/mnt/cache/awq-1", "--tp=1"),
        pod("Pending", "quantize", "awq", "/mnt/cache/fetch-2", "/mnt/cache/awq-2"),
        pod("Succeeded", "fetch", "hf://o/n", "/mnt/cache/fetch-3"),
        pod("Running", "evict", "/mnt/cache", "fetch-4"),
        pod("Running", "serve", "/mnt/source/model"),
    ]
    assert artefacts_of_pods(pods) == {"awq-1", "fetch-2", "awq-2"}


def test_an_evictions_answer_is_believed_as_far_as_it_was_asked() -> None:
    artefact = {"evicted": ["fetch-a", "fetch-z"]}
    assert read_eviction(TerminationMessage(Reason.COMPLETED, artefact=artefact), ("fetch-a", "fetch-b")) == ["fetch-a"]
    assert read_eviction(TerminationMessage(Reason.COMPLETED, artefact={"evicted": 3}), ("fetch-a",)) == []


def test_what_a_job_found_is_believed_where_it_can_be_an_artefact() -> None:
    whole = {"fetch-00000000bb": 3, "fetch-00000000cc": "many", "fetch-00000000dd": True, "fetch-b": 3, "../x": 4, "awq-00000000ee": -1}
    answer = TerminationMessage(Reason.COMPLETED, artefact={"found": whole, "halves": {"awq-00000000ff": 0}})
    assert read_contents(answer) == ({"fetch-00000000bb": 3}, {"awq-00000000ff": 0})
    assert read_contents(TerminationMessage(Reason.COMPLETED, artefact={"found": [], "halves": 3})) == ({}, {})
