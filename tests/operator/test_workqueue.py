"""The work queue: one worker a key, nothing lost, nothing twice, failures back off."""

from __future__ import annotations

import asyncio

import pytest
from gantline_operator.workqueue import Rank, Schedule, WorkQueue, backoff_s
from hypothesis import given
from hypothesis import strategies as st


def test_a_key_added_many_times_is_handed_out_once() -> None:
    schedule: Schedule[str] = Schedule()
    for now in range(5):
        schedule.add("a", now)
    assert schedule.pop(5) == "a"
    assert schedule.pop(5) is None


def test_keys_come_in_the_order_in_which_they_were_added_first() -> None:
    schedule: Schedule[str] = Schedule()
    for key in ("a", "b", "a", "c"):
        schedule.add(key, 0)
    assert [schedule.pop(0) for _ in range(3)] == ["a", "b", "c"]


def test_a_key_that_is_worked_on_waits_for_its_worker_and_then_comes_again_once() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add("a", 0)
    schedule.pop(0)
    schedule.add("a", 1)
    schedule.add("a", 2)
    assert schedule.pop(3) is None
    assert schedule.depth == 1
    schedule.done("a", 3)
    assert schedule.pop(3) == "a"
    schedule.done("a", 4)
    assert schedule.pop(4) is None


def test_a_delayed_key_comes_when_it_is_due_and_the_earliest_delay_wins() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add_at("a", 10)
    schedule.add_at("a", 5)
    schedule.add_at("a", 20)
    assert schedule.next_due() == 5
    assert schedule.pop(4.9) is None
    assert schedule.pop(5) == "a"
    schedule.done("a", 5)
    assert schedule.pop(100) is None, "the later delays were superseded"


def test_an_event_overtakes_a_delay() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add_at("a", 100)
    schedule.add("a", 1)
    assert schedule.pop(1) == "a"
    schedule.done("a", 2)
    assert schedule.next_due() is None


def test_new_keys_go_first_routine_ones_last_and_each_comes_once_by_its_best_rank() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add_at("routine", 0, Rank.ROUTINE)
    schedule.add_at("both", 0, Rank.ROUTINE)
    schedule.add("a", 0)
    schedule.add("b", 0)
    schedule.add("c", 1, Rank.NEW)
    schedule.add("b", 2, Rank.NEW)
    schedule.add("b", 3)
    schedule.add_at("b", 3, Rank.ROUTINE)
    assert schedule.oldest_age(10) == 10
    assert schedule.pop(4) == "c"
    schedule.add("both", 4)
    assert [schedule.pop(4) for _ in range(5)] == ["b", "a", "both", "routine", None]


def test_a_delay_asked_for_while_working_survives_the_end_of_the_work() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add("a", 0)
    schedule.pop(0)
    schedule.add_at("a", 7)
    schedule.done("a", 1)
    assert schedule.pop(6) is None
    assert schedule.pop(7) == "a"


def test_the_age_of_the_queue_is_that_of_its_oldest_key() -> None:
    schedule: Schedule[str] = Schedule()
    assert schedule.oldest_age(9) == 0
    schedule.add("a", 2)
    schedule.add("b", 5)
    assert schedule.oldest_age(9) == 7


_ACTIONS = st.tuples(st.sampled_from(["add", "at", "pop", "done"]), st.integers(0, 3), st.integers(0, 9), st.sampled_from(Rank))


@given(st.lists(_ACTIONS, max_size=60))
def test_no_key_has_two_workers_and_none_is_lost(steps: list[tuple[str, int, int, Rank]]) -> None:
    schedule: Schedule[int] = Schedule()
    working: set[int] = set()
    owed: set[int] = set()
    now = 0.0
    for action, key, number, rank in steps:
        now += 1
        if action == "add":
            schedule.add(key, now, rank)
            owed.add(key)
        elif action == "at":
            schedule.add_at(key, now + number, rank)
            owed.add(key)
        elif action == "pop" and (popped := schedule.pop(now)) is not None:
            assert popped not in working
            working.add(popped)
            owed.discard(popped)
        elif action == "done" and key in working:
            working.remove(key)
            schedule.done(key, now)
    for key in sorted(working):
        schedule.done(key, now)
    came = set()
    while (popped := schedule.pop(now + 100)) is not None:
        came.add(popped)
        schedule.done(popped, now + 100)
    assert owed <= came


@pytest.mark.parametrize(("failures", "expected"), [(1, 0.25), (2, 0.5), (3, 1.0), (11, 256.0), (12, 300.0), (4000, 300.0)])
def test_backoff_doubles_up_to_its_cap(failures: int, expected: float) -> None:
    assert backoff_s(failures, 1.0) == expected
    assert backoff_s(failures, 0.0) == expected / 2


async def test_workers_wake_for_new_keys_and_for_delayed_ones() -> None:
    queue: WorkQueue[str] = WorkQueue()
    seen: list[str] = []

    async def work() -> None:
        while True:
            key = await queue.get()
            seen.append(key)
            queue.done(key)

    workers = [asyncio.create_task(work()) for _ in range(3)]
    queue.add_after("late", 0.05)
    queue.add("now")
    await asyncio.sleep(0.02)
    assert seen == ["now"]
    await asyncio.sleep(0.1)
    assert seen == ["now", "late"]
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)


async def test_failures_wait_longer_each_time_until_forgotten() -> None:
    queue: WorkQueue[str] = WorkQueue(clock=lambda: 0.0, jitter=lambda: 1.0)
    assert [queue.retry("a") for _ in range(3)] == [0.25, 0.5, 1.0]
    assert queue.retry("a", at_least_s=30.0) == 30.0, "the server's Retry-After is the least"
    queue.forget("a")
    assert queue.retry("a") == 0.25
