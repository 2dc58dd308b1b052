"""How many replicas: the table of decisions, and what must hold for whatever is observed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from gantline_operator.autoscaling.decision import Decision, Memory, ScaleReason, decide, owned, told_load
from gantline_operator.autoscaling.observation import Demand, Observation, Replica, Sample
from gantline_operator.autoscaling.policy import Policy
from hypothesis import given, settings
from hypothesis import strategies as st

POLICY = Policy(min=1, max=10, metric="inflight", target=8, down_after_s=60.0, zero_after_s=120.0)
EVERY_S = 5.0


def replicas(
    now: float, *requests: int | None, waiting: int = 0, starting: int = 0, served: float = 0.0, able: int = 0
) -> tuple[Replica, ...]:
    """One ready replica for each number of running requests; None for one that says nothing. The cache has room for `able`."""
    samples = [None if count is None else Sample(now, count, waiting, count / able if able else 0.0, served) for count in requests]
    ready = [Replica(f"r{index}", True, sample) for index, sample in enumerate(samples)]
    return (*ready, *(Replica(f"s{index}", False) for index in range(starting)))


def watch(policy: Policy, observations: Iterable[Observation], memory: Memory | None = None) -> list[Decision]:
    made, memory = [], memory or Memory()
    for seen in observations:
        decision, memory = decide(policy, seen, memory)
        made.append(decision)
    return made


def steady(policy: Policy, seconds: float, current: int, *requests: int | None, demand: Demand | None = None, **more: int) -> Decision:
    """The decision after `seconds` of the same observation."""
    times = [index * EVERY_S for index in range(int(seconds / EVERY_S) + 1)]
    return watch(policy, [Observation(now, current, replicas(now, *requests, **more), demand) for now in times])[-1]


@pytest.mark.parametrize(
    ("current", "requests", "seconds", "wanted", "reason"),
    [
        # the bounds need no knowledge
        (0, [], 0, 1, "BelowMin"),
        (12, [None] * 12, 0, 10, "AboveMax"),
        # up: at once what is more than chance, else what lasts; as far as needed, never past max
        (1, [40], 0, 5, "LoadRose"),
        (1, [800], 0, 10, "LoadRose"),
        (1, [12], 55, 1, "Steady"),
        (1, [12], 60, 2, "LoadRose"),
        # within the band nothing moves, on neither side
        (2, [9, 8], 600, 2, "Steady"),
        (2, [4, 4], 600, 2, "Steady"),
        # down: only after a whole window, as far as the load allows
        (4, [4, 4, 0, 0], 55, 4, "Steady"),
        (4, [4, 4, 0, 0], 60, 2, "LoadFell"),
        (4, [0, 0, 0, 0], 600, 1, "LoadFell"),
        # unknown load never makes a service smaller, but what is known of it may make it larger
        (4, [0, 0, 0, None], 600, 4, "MetricsUnknown"),
        (4, [None] * 4, 600, 4, "MetricsUnknown"),
        (2, [40, None], 10, 5, "LoadRose"),
    ],
)
def test_replicas_follow_load(current: int, requests: list[int | None], seconds: float, wanted: int, reason: str) -> None:
    decision = steady(POLICY, seconds, current, *requests)
    assert (decision.replicas, decision.reason) == (wanted, reason), decision.inputs


def test_replicas_that_are_starting_are_not_asked_for_again() -> None:
    assert steady(POLICY, 300, 5, 40, starting=4).replicas == 5


def test_a_peak_is_remembered_for_the_whole_window() -> None:
    times = [index * EVERY_S for index in range(44)]
    seen = [Observation(t, 3, replicas(t, 8, 8, 8) if 100 <= t <= 160 else replicas(t, 2, 0, 0)) for t in times]
    made = watch(POLICY, seen)
    assert [decision.replicas for decision in made[13:20]] == [1] * 7, "a minute of little load was over before"
    assert {decision.replicas for decision in made[32:44]} == {3}, "for a minute after the peak's mean"


def test_what_was_started_for_a_burst_stays_though_its_size_is_not_certain_yet() -> None:
    times = [index * EVERY_S for index in range(40)]
    current, memory, changes = 1, Memory(), []
    for now in times:
        decision, memory = decide(POLICY, Observation(now, current, replicas(now, 20 if now == 100 else 2, starting=current - 1)), memory)
        if decision.replicas != current:
            changes.append((now, decision.replicas))
            current = decision.replicas
    assert changes == [(100, 3), (160, 1)]


def test_a_moment_that_may_be_chance_moves_nothing() -> None:
    times = [index * EVERY_S for index in range(60)]
    seen = [Observation(t, 2, replicas(t, 12, 11) if t % 60 == 0 else replicas(t, 7, 7)) for t in times]
    assert {decision.replicas for decision in watch(POLICY, seen)} == {2}


def test_a_gap_in_knowledge_starts_the_window_anew() -> None:
    times = [index * EVERY_S for index in range(40)]
    seen = [Observation(t, 3, replicas(t, None if t == 50 else 0, 0, 0)) for t in times]
    made = watch(POLICY, seen)
    first = next(index for index, decision in enumerate(made) if decision.replicas < 3)
    assert times[first] == 55 + 60


def test_one_late_answer_is_no_gap_since_the_last_one_is_still_fresh() -> None:
    old = Sample(0.0, 3, 0, 0.0, 0.0)
    seen = Observation(14.0, 1, (Replica("r", True, old),))
    assert watch(POLICY, [seen])[0].reason is ScaleReason.STEADY
    assert watch(POLICY, [replace(seen, now=16.0)])[0].reason is ScaleReason.METRICS_UNKNOWN


def test_a_replica_that_stopped_answering_is_unknown_also_once_it_is_no_longer_ready() -> None:
    hung = Replica("r", False, Sample(0.0, 30, 0, 0.0, 0.0))
    assert watch(POLICY, [Observation(100.0, 2, (hung, *replicas(100.0, 0)))])[0].reason is ScaleReason.METRICS_UNKNOWN


def test_nothing_shrinks_while_two_revisions_are_about() -> None:
    seen = [Observation(index * EVERY_S, 4, replicas(index * EVERY_S, 0, 0, 0, 0), rolling=True) for index in range(40)]
    assert {(decision.replicas, decision.reason) for decision in watch(POLICY, seen)} == {(4, "RollingOut")}


def test_with_max_on_unknown_blindness_is_answered_by_all_there_may_be() -> None:
    cautious = replace(POLICY, on_unknown="Max")
    assert steady(cautious, 0, 2, None, None).replicas == 10
    assert steady(cautious, 0, 2, 1, None).replicas == 2, "one of them is known"


# ---- to zero and back ----------------------------------------------------------------------------------------------------------------

SLEEPY = replace(POLICY, min=0)
QUIET = Demand(quiet_s=1000.0)


@pytest.mark.parametrize(
    ("demand", "requests", "seconds", "wanted"),
    [
        (QUIET, [0], 120, 0),
        (QUIET, [0], 115, 1),
        (Demand(quiet_s=None), [0], 120, 0),  # no gateway has ever seen a request
        (Demand(quiet_s=119.0), [0], 600, 1),
        (Demand(quiet_s=1000.0, running=1), [0], 600, 1),
        (Demand(quiet_s=1000.0, complete=False), [0], 600, 1),  # a gateway did not answer
        (Demand(quiet_s=None, gateways=0), [0], 600, 1),  # nobody could wake it
        (None, [0], 600, 1),
        (QUIET, [None], 600, 1),
        (QUIET, [1], 600, 1),
    ],
)
def test_a_service_sleeps_only_where_it_is_known_that_nobody_asks(
    demand: Demand | None, requests: list[int | None], seconds: float, wanted: int
) -> None:
    assert steady(SLEEPY, seconds, 1, *requests, demand=demand).replicas == wanted


def test_a_service_does_not_sleep_before_a_replica_has_become_ready() -> None:
    assert steady(SLEEPY, 600, 1, demand=QUIET, starting=1).replicas == 1


def test_a_request_between_two_samples_keeps_a_service_awake() -> None:
    times = [index * EVERY_S for index in range(60)]
    seen = [Observation(t, 1, replicas(t, 0, served=100.0 if t >= 100 else 0.0), QUIET) for t in times]
    made = watch(SLEEPY, seen)
    assert times[next(index for index, decision in enumerate(made) if decision.replicas == 0)] == 220


def test_a_missed_answer_does_not_keep_an_idle_service_awake_but_none_is_put_to_sleep_unknown() -> None:
    times = [index * EVERY_S for index in range(60)]
    seen = [Observation(t, 1, replicas(t, None if t in (60, 120, 125) else 0), QUIET) for t in times]
    made = watch(SLEEPY, seen)
    assert times[next(index for index, decision in enumerate(made) if decision.replicas == 0)] == 130


@pytest.mark.parametrize(
    ("policy", "held", "wanted"),
    [
        (SLEEPY, 1, 1),
        (SLEEPY, 8, 1),
        (SLEEPY, 40, 5),
        (SLEEPY, 10_000, 10),
        (replace(SLEEPY, min=0, metric="queue", target=4), 40, 1),  # an engine's batch, while nothing has been learnt
        (replace(SLEEPY, min=0, metric="kvCache", target=80), 40, 1),
        (replace(SLEEPY, min=0, target=None, max_batch=32), 40, 5),
    ],
)
def test_held_requests_wake_a_service_at_once(policy: Policy, held: int, wanted: int) -> None:
    decision = watch(policy, [Observation(0.0, 0, (), Demand(held=held))])[0]
    assert (decision.replicas, decision.reason) == (wanted, "HeldRequests")


def test_a_held_request_wakes_also_where_another_gateway_does_not_answer() -> None:
    assert watch(SLEEPY, [Observation(0.0, 0, (), Demand(held=1, complete=False))])[0].replicas == 1


def test_a_sleeping_service_sleeps_on_while_nobody_asks() -> None:
    assert steady(SLEEPY, 600, 0, demand=QUIET).replicas == 0


# ---- what load is --------------------------------------------------------------------------------------------------------------------


AUTO = replace(POLICY, target=None, startup_s=120.0)
QUEUE = replace(POLICY, metric="queue", target=4)


@pytest.mark.parametrize(
    ("startup_s", "requests", "able", "wanted"),
    [
        # the longer a start takes, the more room there is for what comes meanwhile
        (120.0, 32, 32, 4),
        (40.0, 32, 32, 2),
        (5.0, 32, 32, 2),
        (1200.0, 32, 32, 5),
        # what a cache has room for is known from the first request on, and no replica runs more than its batch
        (120.0, 32, 128, 1),
        (120.0, 100, 10_000, 2),
        # one long request is not two replicas' load, however much of a cache it fills
        (120.0, 1, 1, 1),
    ],
)
def test_auto_keeps_room_for_a_start(startup_s: float, requests: int, able: int, wanted: int) -> None:
    policy = replace(AUTO, startup_s=startup_s)
    decision = steady(policy, 60, 1, requests, able=able)
    assert decision.replicas == wanted, decision.inputs
    assert f"starts in {startup_s:.0f} s" in decision.inputs


def test_a_target_of_requests_needs_nothing_learnt() -> None:
    assert steady(replace(AUTO, target=8), 60, 1, 32, able=32).replicas == 4
    assert steady(replace(AUTO, target=8), 60, 1, 32, able=1000).replicas == 4


def test_a_long_queue_doubles_the_replicas_and_no_more() -> None:
    full = steady(QUEUE, 60, 2, 20, 20, waiting=20)
    assert steady(QUEUE, 60, 2, 20, 20, waiting=2000).replicas == full.replicas == 4
    told = Demand(running=4000)
    assert steady(QUEUE, 60, 2, 20, 20, waiting=2000, able=20, demand=told).replicas == 4, "the gateways' count of them is not one more"


def test_a_busy_replica_with_an_empty_queue_is_not_taken_away() -> None:
    assert steady(QUEUE, 600, 2, 18, 18, able=20).replicas == 2


def test_a_queue_behind_full_replicas_starts_another() -> None:
    assert steady(QUEUE, 60, 2, 20, 20, waiting=10).replicas == 3


def test_replicas_that_were_full_decide_for_an_hour_what_one_can_run() -> None:
    """However empty their caches were then: it was something else that was full."""
    overloaded = [Observation(t, 1, replicas(t, 20, waiting=30, able=200)) for t in (0.0, 5.0)]
    later = [Observation(t, 2, replicas(t, 14, 14, able=200)) for t in (10.0 + index * EVERY_S for index in range(12 * 62))]
    made = watch(QUEUE, [*overloaded, *later])
    first = next(index for index, decision in enumerate(made) if decision.replicas == 1 and index > 2)
    assert made[first - 1].replicas == 2 and later[first - 2].now >= 3600, "28 would not run on one of them"
    more = [replace(seen, replicas=replicas(seen.now, 25, 3, able=200)) for seen in later[:1]]
    assert watch(QUEUE, [*overloaded, *more, *later[1:40]])[-1].replicas == 2
    most = [replace(seen, replicas=replicas(seen.now, 60, 3, able=200)) for seen in later[:1]]
    assert watch(QUEUE, [*overloaded, *most, *later[1:40]])[-1].replicas == 1, "one has been seen running all of them since"


def test_a_full_cache_with_a_queue_asks_for_more_than_a_full_cache() -> None:
    cache = replace(POLICY, metric="kvCache", target=80)
    assert steady(cache, 60, 1, 10, able=10).replicas == 2
    assert steady(cache, 60, 1, 10, able=10, waiting=20).replicas == 3


# ---- who owns what -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("controller", "current", "wanted", "written"),
    [
        ("Gantline", 3, 5, 5),
        ("HPA", 3, 5, 3),
        ("HPA", 0, 4, 1),
        ("HPA", 1, 0, 0),
        ("HPA", 2, 0, 2),
        ("KEDA", 0, 4, 0),
        ("KEDA", 1, 0, 1),
    ],
)
def test_only_the_named_controller_changes_replicas(controller: str, current: int, wanted: int, written: int) -> None:
    policy = replace(SLEEPY, controller=controller)
    assert owned(policy, current, Decision(wanted, ScaleReason.STEADY, "")) == written


ASLEEP, HELD = Demand(quiet_s=900.0), Demand(held=1, quiet_s=0.0)


@pytest.mark.parametrize(
    ("seconds", "current", "requests", "more", "demand", "told"),
    [
        (0, 1, [6], {}, ASLEEP, 0.75),
        # nobody asks: told for sure only once a poll cannot have missed it
        (0, 1, [0], {}, ASLEEP, 0.001),
        (10, 1, [0], {}, ASLEEP, 0.001),
        (15, 1, [0], {}, ASLEEP, 0.0),
        # what only starts is not put to sleep, and what an operator knows nothing of yet is not woken
        (600, 1, [], {"starting": 1}, ASLEEP, 0.001),
        (0, 0, [], {}, ASLEEP, 0.0),
        (0, 0, [], {}, Demand(running=3), 0.0),
        (0, 0, [], {}, HELD, 0.125),
        # the unknown is no number
        (600, 2, [0, None], {}, ASLEEP, None),
        (600, 1, [0], {}, None, None),
        (600, 1, [0], {}, replace(ASLEEP, complete=False), None),
    ],
)
def test_what_keda_is_told_is_zero_only_where_a_service_may_sleep(
    seconds: float, current: int, requests: list[int | None], more: dict[str, int], demand: Demand | None, told: float | None
) -> None:
    policy, memory = replace(SLEEPY, controller="KEDA"), Memory()
    for now in (index * EVERY_S for index in range(int(seconds / EVERY_S) + 1)):
        seen = Observation(now, current, replicas(now, *requests, **more), demand)
        memory = decide(policy, seen, memory)[1]
    assert told_load(policy, seen, memory) == told


# ---- whatever is observed ------------------------------------------------------------------------------------------------------------

METRICS = st.sampled_from(["queue", "kvCache", "inflight"])
POLICIES = st.builds(
    lambda low, more, metric, target, unknown: Policy(
        min=low, max=max(1, low + more), metric=metric, target=target, down_after_s=30.0, zero_after_s=40.0, on_unknown=unknown
    ),
    st.integers(0, 3), st.integers(0, 12), METRICS, st.one_of(st.none(), st.integers(1, 100)), st.sampled_from(["Hold", "Max"]),
)  # fmt: skip
STATES = st.tuples(st.booleans(), st.one_of(st.none(), st.tuples(st.integers(0, 300), st.integers(0, 300), st.floats(0, 1))))
DEMANDS = st.one_of(
    st.none(), st.builds(Demand, st.integers(0, 50), st.integers(0, 5), st.one_of(st.none(), st.floats(0, 200)), st.booleans())
)
STEPS = st.tuples(st.lists(STATES, max_size=6), DEMANDS, st.booleans(), st.integers(0, 20))


@settings(max_examples=60)
@given(policy=POLICIES, steps=st.lists(STEPS, min_size=1, max_size=12))
def test_bounds_are_kept_and_the_unknown_never_makes_a_service_smaller(policy: Policy, steps: list[object]) -> None:
    memory, now = Memory(), 0.0
    for states, demand, rolling, current in steps:  # type: ignore[misc]
        now += 10.0
        pods = tuple(
            Replica(f"r{index}", ready, None if sample is None else Sample(now, sample[0], sample[1], sample[2], now))
            for index, (ready, sample) in enumerate(states)
        )
        decision, memory = decide(policy, Observation(now, current, pods, demand, rolling), memory)
        assert policy.min <= decision.replicas <= policy.max
        if any(replica.unknown(now, policy.stale_after_s) for replica in pods) and current <= policy.max:
            assert decision.replicas >= current
        if decision.replicas == 0 and current > 0:
            assert demand is not None and demand.complete and not demand.held and not demand.running


@settings(max_examples=60)
@given(policy=POLICIES, total=st.integers(0, 2000), start=st.integers(1, 10))
def test_constant_load_is_answered_once_and_then_never_again(policy: Policy, total: int, start: int) -> None:
    """The load is spread over what is there; replicas start and end at once."""
    policy = replace(policy, metric="inflight", min=max(1, policy.min))  # `able` is not told, so that auto is a share of the batch
    current, memory, changes = min(policy.max, max(policy.min, start)), Memory(), []
    for index in range(60):
        now = index * EVERY_S
        shares = [total // current + (number < total % current) for number in range(current)]
        decision, memory = decide(policy, Observation(now, current, replicas(now, *shares)), memory)
        if decision.replicas != current:
            changes.append(decision.replicas)
            current = decision.replicas
    assert len(changes) <= 1
