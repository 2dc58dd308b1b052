"""Limits of API keys: tokens a minute and requests at once, split over replicas that know nothing of each other."""

from __future__ import annotations

import json

import pytest
from gantline_gateway.keys import ApiKey
from gantline_gateway.limits import Limiter, OverLimit, Share, estimate_tokens, split
from gantline_gateway.question import parse_question
from hypothesis import given
from hypothesis import strategies as st


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("tokens", "concurrency", "replicas", "share"),
    [
        (600, 4, 1, Share(600.0, 4)),
        (600, 4, 2, Share(300.0, 2)),
        (600, 5, 2, Share(300.0, 3)),
        (600, 1, 3, Share(200.0, 1)),
        (600, 4, 0, Share(600.0, 4)),
        (None, None, 3, Share(None, None)),
    ],
)
def test_limits_are_split_over_the_live_replicas(tokens: int | None, concurrency: int | None, replicas: int, share: Share) -> None:
    assert split(ApiKey("a", tokens_per_minute=tokens, concurrency=concurrency), replicas) == share


@given(st.integers(1, 10**6), st.integers(1, 100))
def test_no_share_is_nothing_and_all_together_exceed_concurrency_by_less_than_one_each(limit: int, replicas: int) -> None:
    share = split(ApiKey("a", tokens_per_minute=limit, concurrency=limit), replicas)
    assert share.concurrency is not None and share.tokens_per_minute is not None
    assert share.concurrency >= 1 and limit <= share.concurrency * replicas < limit + replicas
    assert share.tokens_per_minute * replicas == pytest.approx(limit)


def refused(limiter: Limiter, key: ApiKey, estimate: int) -> OverLimit:
    with pytest.raises(OverLimit) as error:
        limiter.admit(key, estimate)
    return error.value


def test_what_was_estimated_too_high_is_given_back_and_what_was_too_low_is_owed() -> None:
    clock, key = Clock(), ApiKey("a", tokens_per_minute=600)
    limiter = Limiter(clock)
    first = limiter.admit(key, 500)
    assert refused(limiter, key, 200).retry_after_s == 10, "100 are missing at 10 a second"
    first.close(100)
    second = limiter.admit(key, 400)
    second.close(1000)
    assert refused(limiter, key, 100).retry_after_s == 60, "500 are owed, and 100 wanted"
    clock.now += 60
    limiter.admit(key, 100)


def test_after_the_time_that_is_told_the_same_request_fits_and_not_before() -> None:
    clock, key = Clock(), ApiKey("a", tokens_per_minute=60)
    limiter = Limiter(clock)
    limiter.admit(key, 60)
    wait = refused(limiter, key, 30).retry_after_s
    clock.now += wait - 1
    refused(limiter, key, 30)
    clock.now += 1
    limiter.admit(key, 30)


def test_a_request_larger_than_a_minute_waits_for_a_full_bucket_and_is_let_in_then() -> None:
    clock, key = Clock(), ApiKey("a", tokens_per_minute=60)
    limiter = Limiter(clock)
    limiter.admit(key, 10)
    assert refused(limiter, key, 10_000).retry_after_s == 10
    clock.now += 10
    limiter.admit(key, 10_000)
    assert refused(limiter, key, 1).retry_after_s == 3600, "no longer than an hour: much may change meanwhile"


def test_requests_at_once_are_counted_until_they_end_and_end_once() -> None:
    clock, key = Clock(), ApiKey("a", concurrency=2)
    limiter = Limiter(clock)
    first, _ = limiter.admit(key, 1), limiter.admit(key, 1)
    assert refused(limiter, key, 1).limit == "concurrency"
    clock.now += 40
    first.close(None)
    first.close(None)
    third = limiter.admit(key, 1)
    assert refused(limiter, key, 1).retry_after_s > 1, "as long as its requests take, by the number that run"
    third.close(None)


def test_a_larger_number_of_replicas_makes_the_share_smaller_at_once() -> None:
    clock, key = Clock(), ApiKey("a", tokens_per_minute=600, concurrency=2)
    limiter = Limiter(clock)
    limiter.admit(key, 0).close(0)
    limiter.replicas = 2
    limiter.admit(key, 300)
    limiter.replicas = 1
    assert refused(limiter, key, 300).limit == "tokens", "a full share was used; the other half only fills"


def test_keys_of_one_name_share_a_limit_and_others_do_not() -> None:
    limiter = Limiter(Clock())
    limiter.admit(ApiKey("a", concurrency=1), 1)
    refused(limiter, ApiKey("a", concurrency=1, weight=2.0), 1)
    limiter.admit(ApiKey("b", concurrency=1), 1)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"max_tokens": 50}, 150),
        ({"max_completion_tokens": 10, "max_tokens": 50}, 110),
        ({"max_output_tokens": 10, "n": 3}, 130),
        ({}, 356),
        ({"max_tokens": "many", "n": -1}, 356),
        ({"max_tokens": 10**30, "n": 10**30}, 356),
    ],
)
def test_what_a_request_may_use_is_estimated_from_its_prompt_and_its_bounds(fields: dict[str, object], tokens: int) -> None:
    question = parse_question(json.dumps({"model": "chat", "prompt": "x" * 398, **fields}).encode())
    assert estimate_tokens(question) == tokens
