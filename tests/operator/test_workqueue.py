"""The work queue: one worker a key, nothing lost, nothing twice, failures back off."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import pytest
from gantline_operator.client import Client
from gantline_operator.controller import Controller
from gantline_operator.settings import OperatorSettings
from gantline_operator.workqueue import Rank, Schedule, WorkQueue, backoff_s
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.aio.client import Configuration


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
    queue.succeed("a", None)
    assert queue.retry("a") == 0.25


class Returning:
    """One key, worked on whenever it is due."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queue: WorkQueue[str] = WorkQueue(clock=lambda: self.now, jitter=lambda: 1.0)

    def succeed(self, again_s: float | None) -> float | None:
        """Seconds after which it comes back, at which time it is then."""
        return self._pass(lambda: self.queue.succeed("a", again_s))

    def fail(self) -> float | None:
        return self._pass(lambda: self.queue.retry("a"))

    def _pass(self, end: Callable[[], object]) -> float | None:
        schedule = self.queue._schedule
        schedule.add("a", self.now)
        assert schedule.pop(self.now) == "a"
        end()
        schedule.done("a", self.now)
        due = schedule.next_due()
        if due is None:
            return None
        waited_s, self.now = due - self.now, due
        return round(waited_s, 3)


@pytest.mark.parametrize("asked_s", [0.0, -5.0, 0.001, math.nan])
def test_work_that_asks_for_more_at_once_time_after_time_waits_longer_each_time(asked_s: float) -> None:
    key = Returning()
    assert [key.succeed(asked_s) for _ in range(6)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
    for _ in range(20):
        key.succeed(asked_s)
    assert key.succeed(asked_s) == 60.0
    assert key.fail() == 0.25
    assert key.succeed(asked_s) == 60.0, "a failure in between is no progress"


@pytest.mark.parametrize("calm_s", [None, 0.5, 300.0])
def test_a_step_that_is_followed_by_another_one_is_followed_at_once_and_polls_keep_their_pace(calm_s: float | None) -> None:
    key = Returning()
    for _ in range(5):
        assert key.succeed(0.0) == 0.05
        assert key.succeed(0.3) == 0.3, "what is asked for is the least"
        assert [key.succeed(calm_s) for _ in range(3)] == [calm_s] * 3


def test_an_event_does_not_wait_for_work_that_came_back_too_often() -> None:
    key = Returning()
    for _ in range(20):
        key.succeed(0.0)
    key.queue.succeed("a", 0.0)
    key.queue.add("a")
    assert key.queue._schedule.pop(key.now) == "a"


async def test_a_reconcile_that_is_never_done_does_not_keep_a_worker_busy() -> None:
    controller = Controller(Client(Configuration()), OperatorSettings(), "test")
    looked: list[tuple[str, str]] = []

    async def reconcile(key: tuple[str, str]) -> float | None:
        looked.append(key)
        return 0.0

    controller.reconcile = reconcile  # type: ignore[method-assign]
    controller.queue.add(("default", "restless"))
    worker = asyncio.create_task(controller._work(0))
    await asyncio.sleep(1.0)
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)
    assert 3 <= len(looked) <= 6, "at 0, 0.05, 0.15, 0.35 and 0.75 s"
