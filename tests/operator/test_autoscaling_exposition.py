"""What replicas and gateways answer is not trusted: what is not as agreed is unknown, and unknown is no number."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gantline_gateway.catalog import Catalog, Service
from gantline_gateway.demand import describe_demand
from gantline_gateway.directory import Directory
from gantline_gateway.traffic import Traffic
from gantline_operator.autoscaling.exposition import add_demands, parse_demand, parse_sample
from gantline_operator.autoscaling.observation import Demand, Sample
from gantline_runtime.engine_messages import EngineReport
from gantline_runtime.server.lifecycle import State
from gantline_runtime.server.metrics import Metrics
from hypothesis import given, settings
from hypothesis import strategies as st

GOOD = {"held": 3, "held_since_s": 1.5, "running": 8, "last_request_age_s": 0.25}


def test_what_the_server_says_is_understood() -> None:
    metrics = Metrics("1")
    metrics.engine(EngineReport(num_running=7, num_waiting=2, cache_usage=0.5))
    metrics.prompt_tokens.inc(123)
    assert parse_sample(metrics.render(State.READY).decode(), 4.0) == Sample(4.0, 7, 2, 0.5, 123.0)


@pytest.mark.parametrize("change", ["NaN", "-1", "+Inf", "many", "1e400", ""])
def test_a_sample_with_a_number_that_is_none_is_no_sample(change: str) -> None:
    lines = ["gantline_num_requests_running 1", "gantline_num_requests_waiting 0", "gantline_kv_cache_usage_perc 0.5"]
    text = "\n".join([*lines, "gantline_prompt_tokens_total 5"])
    assert parse_sample(text, 0.0) is not None
    assert parse_sample(text.replace("running 1", f"running {change}"), 0.0) is None
    assert parse_sample("\n".join(lines), 0.0) is None, "one is missing"


def test_what_gateways_say_is_added_up_and_one_that_is_silent_is_remembered() -> None:
    quiet = {"held": 0, "held_since_s": 0.0, "running": 0, "last_request_age_s": None}
    first, second = (parse_demand(json.dumps({"services": {"a/b": said}})) for said in (GOOD, quiet))
    assert add_demands([first, second], "a/b") == Demand(held=3, running=8, quiet_s=0.25, complete=True, gateways=2)
    assert add_demands([first, first], "a/b") == Demand(held=6, running=16, quiet_s=0.25, complete=True, gateways=2)
    assert add_demands([first, None], "a/b").complete is False
    assert add_demands([first, {}], "a/b").complete is False, "it does not know the service"
    assert add_demands([], "a/b") == Demand(complete=True, gateways=0)
    assert add_demands([second], "a/b") == Demand(quiet_s=None)


def test_what_a_gateway_says_is_understood() -> None:
    directory, traffic = Directory(), Traffic(clock=lambda: 100.0)
    directory.publish(Catalog((Service("a", "busy"), Service("a", "quiet"), Service("b", "unasked"))))
    traffic.of("a/busy").running, traffic.of("a/busy").held[7] = 2, 95.0
    traffic.of("a/quiet").last_request_at = 40.0
    said = parse_demand(json.dumps(describe_demand(directory, traffic)))
    assert said == {"a/busy": Demand(1, 2, 0.0), "a/quiet": Demand(0, 0, 60.0), "b/unasked": Demand(0, 0, None)}


@pytest.mark.parametrize(
    "answer",
    ["", "[]", "null", "{}", '{"services": []}', '{"services": {"a/b": 1}}', "[" * 100_000]
    + [json.dumps({"services": {"a/b": {**GOOD, key: value}}}) for key in ("held", "running") for value in (-1, "x", None, True, [])]
    + ['{"services": {"a/b": {"last_request_age_s": "soon"}}}', '{"services": {"a/b": {"held": NaN}}}'],
)
def test_an_answer_that_is_not_as_agreed_is_none(answer: str) -> None:
    assert parse_demand(answer) is None


@settings(max_examples=50)
@given(st.text(max_size=200))
def test_nothing_that_is_answered_is_raised(text: str) -> None:
    assert parse_sample(text, 0.0) is None
    assert parse_demand(text) is None


LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=5)
JSON: Any = LEAVES | st.dictionaries(st.sampled_from(["held", "running", "last_request_age_s", "x"]), LEAVES, max_size=3)


@settings(max_examples=50)
@given(JSON)
def test_no_json_is_raised_either(value: Any) -> None:
    parse_demand(json.dumps({"services": value}))
    parse_demand(json.dumps({"services": {"a/b": value}}))
