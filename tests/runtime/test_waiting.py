"""Whose turn it is, and who may wait: fairness between API keys, priorities, bounds, and what is told to who is refused."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import pytest
from gantline_runtime.admission import Admission
from gantline_runtime.engine_loop import EngineLoop
from gantline_runtime.messages import EngineRequest
from gantline_runtime.request import QueueFull, Sequence
from gantline_runtime.waiting import WaitingQueue

from tests.runtime.engine_support import drain, fake_engine, request


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def of(tenant: str, name: str, prompt: list[int] | None = None, count: int = 4, *, weight: float = 1.0, priority: int = 0) -> EngineRequest:
    base = request(name, prompt or [1, 2, 3], count)
    return msgspec.structs.replace(base, tenant=tenant, weight=weight, priority=priority)


def order_of_first_tokens(engine: EngineLoop) -> list[str]:
    seen: dict[str, None] = {}
    for _ in range(10_000):
        if not engine.has_work():
            return list(seen)
        for output in engine.step():
            seen.setdefault(output.request_id)
        engine.check_integrity()
    raise AssertionError("the engine does not come to an end")


def test_one_keys_flood_does_not_make_another_key_wait_behind_it() -> None:
    engine, _ = fake_engine(max_batch_size=1)
    for i in range(20):
        engine.add_request(of("flood", f"flood-{i}"))
    engine.step()
    for i in range(3):
        engine.add_request(of("other", f"other-{i}"))
    order = order_of_first_tokens(engine)
    places = [order.index(f"other-{i}") for i in range(3)]
    assert places[0] <= 2 and places[2] <= 6, "they take turns"
    assert [name for name in order if name.startswith("flood")] == [f"flood-{i}" for i in range(20)]


def test_turns_are_measured_in_tokens_not_in_requests() -> None:
    engine, _ = fake_engine(max_batch_size=1, num_cache_blocks=64)
    for i in range(6):
        engine.add_request(of("long", f"long-{i}", [1] * 100, 100))
        engine.add_request(of("short", f"short-{i}", [1] * 10, 10))
    order = order_of_first_tokens(engine)
    assert order.index("short-5") < order.index("long-2")


@pytest.mark.parametrize("weight", [2.0, 3.0])
def test_a_key_of_more_weight_gets_as_much_more(weight: float) -> None:
    engine, _ = fake_engine(max_batch_size=1)
    for i in range(40):
        engine.add_request(of("light", f"light-{i}"))
        engine.add_request(of("heavy", f"heavy-{i}", weight=weight))
    shares = Counter(name.split("-")[0] for name in order_of_first_tokens(engine)[:24])
    assert shares["heavy"] == pytest.approx(weight * shares["light"], abs=weight)


def test_a_key_that_was_idle_has_saved_nothing_up() -> None:
    engine, _ = fake_engine(max_batch_size=1)
    for i in range(10):
        engine.add_request(of("busy", f"busy-{i}"))
    for _ in range(12):
        engine.step()
    for i in range(10):
        engine.add_request(of("late", f"late-{i}"))
    order = order_of_first_tokens(engine)
    first_late = order.index("late-0")
    assert Counter(name.split("-")[0] for name in order[first_late : first_late + 6]) == {"busy": 3, "late": 3}


def test_a_lower_priority_number_runs_first_and_equals_in_the_order_of_arrival() -> None:
    engine, _ = fake_engine(max_batch_size=1)
    for i, priority in enumerate([0, 5, -3, 0, -3, 5]):
        engine.add_request(of("", f"{i}", priority=priority))
    assert order_of_first_tokens(engine) == ["2", "4", "0", "3", "1", "5"]


def test_a_preemption_takes_the_lowest_priority() -> None:
    engine, _ = fake_engine(num_cache_blocks=16, max_prefill_token_num=256, enable_prefix_caching=False)
    for name, priority in (("first", 0), ("urgent", -5), ("patient", 5)):
        engine.add_request(of("", name, [hash(name) % 100] * 60, 80, priority=priority))
    victims = []
    original = engine._scheduler._preempt
    engine._scheduler._preempt = lambda sequence: (victims.append(sequence.request_id), original(sequence))[1]  # type: ignore[method-assign,func-returns-value]
    drain(engine)
    assert victims and victims[0] == "patient"


def _sequence(arrival: int, clock: Clock, **fields: Any) -> Sequence:
    sequence = Sequence(of("", str(arrival), **fields), arrival=arrival, session_len=256, eos_token_ids=())
    sequence.arrived_at, sequence.predicted_tokens = clock.now, 10
    return sequence


def test_nobody_is_overtaken_for_ever() -> None:
    clock = Clock()
    queue = WaitingQueue(clock)
    queue.add(_sequence(0, clock, priority=10))
    for i in range(1, 200):
        clock.now += 1.0
        queue.add(_sequence(i, clock, priority=-10))
        chosen = queue.first()
        assert chosen is not None
        queue.take(chosen)
        if chosen.arrival == 0:
            break
    assert 55 < i < 65


def test_who_cannot_run_yet_is_passed_over_and_keeps_its_place() -> None:
    clock = Clock()
    queue = WaitingQueue(clock)
    compiling, others = _sequence(0, clock), [_sequence(i, clock) for i in range(1, 4)]
    compiling.grammar = "compiles"
    assert not compiling.ready
    for sequence in (compiling, *others):
        queue.add(sequence)
    assert queue.first() is others[0]
    queue.take(others[0])
    clock.now += 100.0
    assert queue.first() is others[1], "nor is it the one that has waited for too long"
    compiling.grammar = ""
    assert queue.first() is compiling
    queue.remove(compiling)
    assert queue.first() is others[1] and len(queue) == 2


def test_a_queue_that_came_and_went_holds_nothing() -> None:
    clock, rng = Clock(), random.Random(3)
    queue = WaitingQueue(clock)
    alive: list[Sequence] = []
    for i in range(3000):
        if rng.random() < 0.5:
            alive.append(_sequence(i, clock, priority=rng.randint(-2, 2)))
            (queue.add if rng.random() < 0.8 else queue.put_back)(alive[-1])
        elif alive and rng.random() < 0.3:
            queue.remove(alive.pop(rng.randrange(len(alive))))
        elif alive:
            first = queue.first()
            assert first is not None and first is next(iter(queue))
            queue.take(first)
            alive.remove(first)
        assert len(queue) == len(alive) and set(queue) == set(alive)
        assert queue.num_tokens == 10 * len(alive)
    for sequence in alive:
        queue.remove(sequence)
    assert queue.first() is None and not queue._order and not queue._by_age and not queue._of_tenant


# ---- bounds


def test_predicted_tokens_are_bounded_and_a_single_request_always_may_wait() -> None:
    engine, _ = fake_engine(max_batch_size=1, max_waiting_tokens=300)
    engine.add_request(request("runs", [1] * 100, 100))
    engine.step()
    engine.add_request(request("waits", [1] * 200, 50))
    with pytest.raises(QueueFull, match="250 predicted tokens"):
        engine.add_request(request("refused", [1] * 20, 40))
    assert len(drain(engine)) == 2


def test_an_answer_is_predicted_from_those_that_ended_and_never_beyond_what_is_allowed() -> None:
    admission = Admission(max_waiting=10, max_waiting_tokens=1000)
    assert admission.predict(100, 4) == 104
    before = admission.predict(100, 100_000)
    clock = Clock()
    for i in range(400):
        sequence = _sequence(i, clock)
        sequence.finish_reason = "stop"
        sequence.tokens.extend([1] * 20)
        admission.ended(sequence)
    assert 100 + 18 <= admission.predict(100, 100_000) <= 100 + 25 < before


def test_a_flood_with_one_key_leaves_places_for_others() -> None:
    engine, _ = fake_engine(max_batch_size=1, max_waiting=50, max_waiting_tokens=1 << 30)
    refused = 0
    for i in range(100):
        try:
            engine.add_request(of("flood", f"flood-{i}"))
        except QueueFull as error:
            refused += 1
            assert "for others" in str(error) and error.retry_after_s > 0
    assert 100 - refused == 41, "four fifths of the queue and one that runs"
    for i in range(8):
        engine.add_request(of("other", f"other-{i}"))
    drain(engine)


def test_who_comes_back_when_told_finds_a_place() -> None:
    """A server that ends one request every 0.5 s, full; 30 clients at once are refused, and each comes back once, when it was told to."""
    clock = Clock()
    admission, queue = Admission(max_waiting=20, max_waiting_tokens=1 << 30, clock=clock), WaitingQueue(clock)
    number = iter(range(10_000))
    for _ in range(20):
        queue.add(_sequence(next(number), clock))

    def serve(seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            clock.now += 0.5
            first = queue.first()
            if first is not None:
                queue.take(first)
                first.finish_reason = "length"
                admission.ended(first)

    def try_once() -> float | None:
        sequence = _sequence(next(number), clock)
        try:
            admission.check(sequence, queue, 0)
        except QueueFull as error:
            return error.retry_after_s
        queue.add(sequence)
        return None

    serve(5.0)
    for _ in range(10):
        try_once()
    told = sorted(seconds for seconds in (try_once() for _ in range(30)) if seconds is not None)
    assert len(told) == 30 and told[0] > 0 and told[-1] == pytest.approx(15.0, rel=0.3)
    began, found = clock.now, 0
    for seconds in told:
        serve(max(0.0, began + seconds - clock.now))
        found += try_once() is None
    assert found >= 27


def test_before_anything_has_ended_a_guess_is_told_and_never_more_than_a_minute() -> None:
    clock = Clock()
    admission, queue = Admission(max_waiting=0, max_waiting_tokens=0, clock=clock), WaitingQueue(clock)
    told = []
    for i in range(100):
        with pytest.raises(QueueFull) as refused:
            admission.check(_sequence(i, clock), queue, 0)
        told.append(refused.value.retry_after_s)
    assert told[0] == 10.0 and max(told) == 60.0
    clock.now += 100.0
    assert admission.seconds_until_room() == 10.0
