"""Which replica: pure, so tables of cases."""

from __future__ import annotations

from collections import Counter

from gantline_gateway.balance import LOAD_FACTOR, SLACK_TOKENS, Candidate, choose
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = [f"pod-{i}" for i in range(8)]
IDLE = [Candidate(name) for name in NAMES]
candidates = st.lists(
    st.builds(Candidate, st.sampled_from(NAMES), st.integers(0, 100_000), st.integers(0, 50)), min_size=1, unique_by=lambda c: c.identity
)


@settings(max_examples=40)
@given(candidates, st.binary(max_size=8), st.binary(max_size=8), st.integers(0, 9))
def test_the_choice_is_one_of_the_candidates_whatever_their_order_and_never_much_busier_than_the_mean(
    found: list[Candidate], prefix: bytes, session: bytes, turn: int
) -> None:
    chosen = choose(found, prefix=prefix, session=session, turn=turn)
    assert chosen in found
    assert choose(found[::-1], prefix=prefix, session=session, turn=turn) == chosen
    mean = sum(candidate.outstanding for candidate in found) / len(found)
    assert chosen.outstanding <= LOAD_FACTOR * mean + SLACK_TOKENS


def test_a_session_and_a_beginning_stay_where_they_are_while_the_others_come_and_go() -> None:
    keys = [f"session {i}".encode() for i in range(200)]
    before = {key: choose(IDLE, session=key).identity for key in keys}
    assert before == {key: choose(IDLE, prefix=key).identity for key in keys}
    assert min(Counter(before.values()).values()) > 200 / len(IDLE) / 3, "they spread"
    after = {key: choose(IDLE[1:], session=key).identity for key in keys}
    assert {key for key in keys if before[key] != after[key]} == {key for key in keys if before[key] == NAMES[0]}


def test_the_replica_that_holds_most_of_the_prompt_gets_it_unless_it_is_much_busier() -> None:
    holders = [Candidate("a", 100, 300), Candidate("b", 4000, 900), Candidate("c", 0, 0)]
    assert choose(holders, prefix=b"x").identity == "b"
    busy = [Candidate("a", 100, 300), Candidate("b", 50_000, 900), Candidate("c", 0, 0)]
    assert choose(busy, prefix=b"x").identity == "a"


def test_what_all_replicas_hold_draws_nobody_and_what_one_holds_more_of_keeps_its_prompts() -> None:
    everywhere = [Candidate("a", 900, 500), Candidate("b", 300, 500), Candidate("c", 600, 500)]
    assert choose(everywhere, prefix=b"x").identity == "b"
    assert choose([Candidate("a", 900, 700), *everywhere[1:]], prefix=b"x").identity == "a"
    load = dict.fromkeys("abcd", 0)
    held: set[str] = set()
    for _ in range(100):  # a beginning that all prompts share, from the first of them on
        chosen = choose([Candidate(name, tokens, 500 * (name in held)) for name, tokens in load.items()], prefix=b"x").identity
        held.add(chosen)
        load[chosen] += 600
    assert held == set(load) and max(load.values()) - min(load.values()) <= 600


def test_a_session_is_stronger_than_what_a_replica_holds() -> None:
    home = choose(IDLE, session=b"s").identity
    other = next(name for name in NAMES if name != home)
    assert choose([Candidate(name, 0, 5 if name == other else 0) for name in NAMES], session=b"s").identity == home


def test_a_hot_beginning_spreads_over_the_next_replicas_in_its_order() -> None:
    load = dict.fromkeys(NAMES, 0)
    for _ in range(800):
        load[choose([Candidate(name, tokens) for name, tokens in load.items()], prefix=b"hot").identity] += 1000
    assert max(load.values()) <= LOAD_FACTOR * 100_000 + SLACK_TOKENS + 1000


def test_without_anything_to_go_by_whoever_has_least_to_do_is_asked_and_equals_take_turns() -> None:
    assert choose([Candidate("a", 9), Candidate("b", 3), Candidate("c", 5)]).identity == "b"
    turns = Counter(choose(IDLE, turn=turn).identity for turn in range(400))
    assert min(turns.values()) > 400 / len(IDLE) / 2
