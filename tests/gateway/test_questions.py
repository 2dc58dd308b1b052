"""What is read of bodies and of streams, and how requests wait in turn: without a network."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from gantline_gateway.answer import Answer
from gantline_gateway.bodies import Bodies
from gantline_gateway.catalog import Catalog, Replica, Service
from gantline_gateway.cluster_objects import CatalogBuilder, parse_duration
from gantline_gateway.directory import Directory
from gantline_gateway.holding import WaitingRoom, retry_after_s
from gantline_gateway.metering import Meter
from gantline_gateway.question import PREFIX_BYTES, parse_question, rename_model
from gantline_gateway.traffic import Traffic, Usage
from gantline_runtime.server.api_error import ApiError
from hypothesis import given, settings
from hypothesis import strategies as st


def question(**fields: Any) -> Any:
    return parse_question(json.dumps({"model": "m", **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"prompt": "x" * 398}, 100),
        ({"prompt": [1, 22, 333]}, 3),
        ({"input_ids": [[1, 2], [3]]}, 3),
        ({"input": "x" * 38, "instructions": "y" * 38}, 20),
        ({}, 0),
    ],
)
def test_the_length_of_a_prompt_is_estimated(fields: dict[str, Any], tokens: int) -> None:
    assert question(**fields).prompt_tokens == tokens


def test_limits_are_read_by_whatever_name_and_nonsense_is_left_to_the_replica() -> None:
    assert question(max_tokens=7).max_tokens == 7
    assert question(max_completion_tokens=8, max_tokens=7).max_tokens == 8
    assert question(max_tokens="many", stream="yes", n=-1).max_tokens is None
    assert (question(stream="yes").stream, question(n=-1).choices, question(n=3, stream=True).choices) == (False, 1, 3)


def test_prompts_share_a_prefix_from_its_length_on() -> None:
    beginning = "x" * PREFIX_BYTES
    assert question(prompt=beginning + "a").prefix == question(prompt=beginning + "b").prefix != b""
    assert question(prompt="y" + beginning).prefix != question(prompt=beginning).prefix
    assert question(prompt="short").prefix == b""


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.lists(st.floats(allow_nan=False, allow_infinity=False)))))
@settings(max_examples=30)
def test_another_model_changes_no_other_field(fields: dict[str, Any]) -> None:
    body = json.dumps({**fields, "model": "a/b"}).encode()
    assert json.loads(rename_model(body, "b")) == {**fields, "model": "b"}


@settings(max_examples=40)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_question_or_an_error(body: bytes) -> None:
    try:
        parse_question(body)
    except ApiError as error:
        assert error.status == 400


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_the_report_at_a_streams_end_is_read_however_it_is_cut(cut: int) -> None:
    text = b'data: {"a":1}\n\ndata: [DONE]\n\n: gantline-usage 12,34,5\n\n'
    meter, at = Meter(question()), len(text) - cut
    passed = meter.take(text[:at]) + meter.take(text[at:])
    assert meter.usage() == Usage(12, 34, 5, exact=True)
    assert passed.startswith(b'data: {"a":1}\n\ndata: [DONE]\n\n')


def test_a_stream_without_a_report_is_counted_by_its_events() -> None:
    meter = Meter(question(prompt="x" * 38))
    for _ in range(4):
        meter.take(b"data: {}\n\n")
    assert meter.usage() == Usage(10, 3, 0)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("1m30s", 90.0), ("1h0m0.5s", 3600.5), ("", None), ("90", None), ("1m ", None)]
)
def test_durations_are_read_as_kubernetes_writes_them(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


def test_a_retry_after_is_what_a_start_still_takes_and_never_at_once() -> None:
    assert [retry_after_s(40.0, waited) for waited in (0.0, 10.5, 38.0, 300.0)] == [40, 30, 5, 5]


def test_room_for_bodies_is_given_back_once() -> None:
    bodies = Bodies(100)
    first, second = bodies.share(), bodies.share()
    first.grow(50)
    first.grow(90)
    with pytest.raises(ApiError, match="in memory"):
        second.grow(20)
    first.resize(10)
    second.grow(90)
    for share in (first, first, second):
        share.release()
    assert bodies.taken == 0


def metadata(name: str) -> dict[str, Any]:
    labels = {"kubernetes.io/service-name": "s"}
    return {"namespace": "n", "name": name, "uid": name, "resourceVersion": "1", "labels": labels}


def test_a_pod_in_two_slices_counts_once_and_one_that_goes_is_asked_only_if_there_is_no_other() -> None:
    def endpoint(pod: str, **conditions: bool) -> dict[str, Any]:
        return {"addresses": ["10.0.0.1"], "conditions": conditions, "targetRef": {"name": pod}}

    def names(*slices: list[dict[str, Any]]) -> list[str]:
        ports = [{"name": "http", "port": 8000}]
        found = [
            {"metadata": metadata(str(number)), "addressType": "IPv4", "ports": ports, "endpoints": endpoints}
            for number, endpoints in enumerate(slices)
        ]
        catalog = CatalogBuilder().build([{"metadata": metadata("s")}], found)
        return [replica.identity for replica in catalog.services[0].usable]

    going = endpoint("going", ready=False, serving=True, terminating=True)
    assert names([endpoint("a", ready=True)], [endpoint("a", ready=False)]) == ["a"]
    assert names([endpoint("a", ready=True), going]) == ["a"]
    assert names([endpoint("a", ready=False, serving=False), going]) == ["going"]
    assert names([endpoint("a", ready=False, serving=False)]) == []


@pytest.mark.parametrize(
    ("spec", "wakes"), [({}, False), ({"scaling": {"min": 1}}, False), ({"scaling": {"min": 0}}, True), ({"scaling": None}, False)]
)
def test_only_what_an_autoscaler_may_have_at_zero_is_waited_for_there(spec: dict[str, Any], wakes: bool) -> None:
    item = {"metadata": metadata("s"), "spec": {**spec, "replicas": 0}}
    assert CatalogBuilder().build([item], []).services[0].wakes is wakes


def test_an_object_is_read_again_when_its_version_changes() -> None:
    builder, item = CatalogBuilder(), {"metadata": metadata("s"), "spec": {"replicas": 1}}
    assert builder.build([item], []).services[0].wanted == 1
    changed = {"metadata": {**metadata("s"), "resourceVersion": "2"}, "spec": {"replicas": 2}}
    assert builder.build([changed], []).services[0].wanted == 2
    assert builder.build([], []).services == ()


async def test_those_who_wait_are_let_go_in_the_order_in_which_they_came_also_if_they_had_to_wait_again() -> None:
    directory, traffic, order = Directory(), Traffic(), []
    room = WaitingRoom(directory, traffic)
    empty, ready = Service("n", "s"), Service("n", "s", replicas=(Replica("a", "10.0.0.1", 8000),))
    directory.publish(Catalog.of([empty]))

    async def send(message: Any) -> None:
        raise AssertionError("nothing is said")

    async def wait(name: str, ticket: Any) -> None:
        answer = Answer({"type": "http"}, send, send)  # type: ignore[arg-type]
        await room.wait("n/s", ticket, answer, stream=True, ready=lambda service: bool(service.usable))
        order.append(name)

    tickets = [room.ticket(1) for _ in range(4)]
    tasks = [asyncio.create_task(wait(str(number), tickets[number])) for number in (2, 0, 3, 1)]
    await asyncio.sleep(0)
    assert len(traffic.of("n/s").held) == 4
    directory.publish(Catalog.of([ready]))
    await asyncio.gather(*tasks)
    assert order == ["0", "1", "2", "3"]
    assert not traffic.of("n/s").held
