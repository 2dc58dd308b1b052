"""Errors of the API server in one table and what becomes of each; events, progress, metrics, health."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import replace
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster, free_port
from gantline_operator.apply import problem_of
from gantline_operator.child_watch import child_key
from gantline_operator.client import (
    ApiError,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    KindMissing,
    NotFound,
    Resource,
    Unavailable,
    read_head,
    translated,
)
from gantline_operator.conditions import Reason
from gantline_operator.events import transitions
from gantline_operator.main import Backoffs, kopf_settings
from gantline_operator.metrics import Metrics
from gantline_operator.preparation import judge
from gantline_operator.stage_runner import read_progress
from gantline_operator.workqueue import RETURN_S
from prometheus_client import generate_latest

from tests.operator.harness import SETTINGS, Operator, install_crd, wait


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (400, Invalid, Reason.REJECTED),
        (401, Forbidden, Reason.FORBIDDEN),
        (403, Forbidden, Reason.FORBIDDEN),
        (404, NotFound, None),
        (409, Conflict, None),
        (410, Gone, None),
        (413, Invalid, Reason.REJECTED),
        (422, Invalid, Reason.REJECTED),
        (429, Unavailable, None),
        (500, Unavailable, None),
        (503, Unavailable, None),
        (418, Invalid, Reason.REJECTED),
    ],
)
def test_each_status_is_one_error_and_either_a_condition_or_a_retry(status: int, error: type[ApiError], reason: Reason | None) -> None:
    body = json.dumps({"kind": "Status", "message": "m", "details": {"name": "x"}}).encode()
    found = translated(status, body)
    assert type(found) is error
    problem = problem_of(found, "Service x")
    assert (problem.reason if problem else None) == reason


def test_a_kind_that_the_cluster_lacks_is_told_from_an_object_that_it_lacks() -> None:
    assert isinstance(translated(404, b"404 page not found"), KindMissing)
    assert isinstance(translated(404, b'{"details": {}}'), KindMissing)
    problem = problem_of(translated(404, b"404 page not found"), "x")
    assert problem is not None
    assert problem.reason is Reason.KIND_MISSING


@pytest.mark.parametrize(
    ("header", "body", "seconds"), [("7", b"", 7.0), (None, b'{"details": {"retryAfterSeconds": 3}}', 3.0), ("soon", b"", 0.0)]
)
def test_the_servers_retry_after_is_honoured(header: str | None, body: bytes, seconds: float) -> None:
    assert translated(429, body, header).retry_after_s == seconds


def test_paths_are_those_of_the_api() -> None:
    jobs = Resource("batch/v1", "Job", "jobs")
    assert jobs.path("ns", "a") == "/apis/batch/v1/namespaces/ns/jobs/a"
    assert Resource("v1", "Pod", "pods").path("ns", "p", "log") == "/api/v1/namespaces/ns/pods/p/log"
    assert Resource("v1", "Node", "nodes").path() == "/api/v1/nodes"


def test_a_child_is_known_by_its_owner_or_else_by_its_label() -> None:
    owner = {"controller": True, "kind": "InferenceService", "name": "chat"}
    for metadata, key in (
        ({"ownerReferences": [{"kind": "Node", "name": "a"}, owner]}, ("n", "chat")),
        ({"labels": {"gantline.io/service": "chat"}}, ("n", "chat")),
        ({}, None),
    ):
        assert child_key(read_head(json.dumps({"metadata": {"namespace": "n", **metadata}}).encode())) == key


def test_what_is_no_object_of_the_api_is_an_answer_that_was_cut_off() -> None:
    for body in (b'{"metadata": {"name": "a"', b"<html>", b"[]", b'{"metadata": []}'):
        with pytest.raises(Unavailable):
            read_head(body)


def test_kopf_retries_for_ever_and_never_longer_than_its_cap() -> None:
    delays = [delay for delay, _ in zip(Backoffs(), range(100), strict=False)]
    assert len(delays) == 100
    assert 1 <= max(delays) <= RETURN_S
    assert kopf_settings().posting.enabled is False


def condition(kind: str, status: str, reason: str) -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": "m"}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [condition("PlanResolved", "True", "Planned")], ["Normal Planned"]),
        ([condition("PlanResolved", "True", "Planned")], [condition("PlanResolved", "True", "Planned")], []),
        ([condition("ModelReady", "False", "Fetching")], [condition("ModelReady", "True", "Fetched")], ["Normal FetchSucceeded"]),
        ([], [condition("ModelReady", "False", "Inspecting")], []),
        ([], [condition("ModelReady", "False", "NotAModel"), condition("Degraded", "True", "NotAModel")], ["Warning NotAModel"]),
        ([condition("Ready", "True", "Ready")], [condition("Ready", "False", "Suspended")], ["Normal Suspended"]),
        ([condition("Ready", "False", "Suspended")], [condition("Ready", "False", "Starting")], ["Normal Resumed"]),
        ([condition("Ready", "False", "Starting")], [condition("Ready", "True", "Ready")], ["Normal RolloutCompleted"]),
    ],
)
def test_events_mark_transitions_only(before: list[Any], after: list[Any], expected: list[str]) -> None:
    found = transitions({"conditions": before}, {"conditions": after})
    assert [f"{event.type} {event.reason}" for event in found] == expected


def test_progress_comes_from_the_latest_line_that_tells_it() -> None:
    lines = [
        '{"message": "downloading", "progress": 0.1, "eta_s": 90}',
        '{"message": "downloading", "progress": 0.45, "eta_s": 50}',
        "Traceback",
    ]
    assert read_progress("\n".join(lines)) == "downloading 45%, 50 s left"
    waits = '{"message": "HTTP 429: trying s3://models/tiny again in 30.0 s", "waiting_s": 30.0}'
    assert read_progress("\n".join([*lines, waits])) == "HTTP 429: trying s3://models/tiny again in 30.0 s"
    assert read_progress("\n".join([waits, *lines])) == "downloading 45%, 50 s left"
    assert read_progress('{"message": "x", "progress": "NaN"}') == "x"
    assert read_progress("nothing\n[1, 2]\n{}") == ""


@pytest.mark.parametrize(
    ("perplexity", "limit", "refused"),
    [
        ({"before": "10", "after": "10.4"}, 0.05, False),
        ({"before": "10", "after": "10.6"}, 0.05, True),
        ({"before": "10", "after": "99"}, None, False),
        ({"before": "10", "after": "nan"}, 0.05, True),
        (None, 0.05, True),
        (None, None, False),
    ],
)
def test_a_copy_is_judged_by_its_perplexity(perplexity: dict[str, str] | None, limit: float | None, refused: bool) -> None:
    trouble, _ = judge({"perplexity": perplexity}, limit)
    assert (trouble is not None) is refused


def test_a_deleted_service_leaves_no_series_behind() -> None:
    metrics = Metrics()
    services: dict[tuple[str, str], Any] = {
        ("ns", "chat"): [condition("Ready", "True", "Ready"), condition("PlanResolved", "Unknown", "x")]
    }
    metrics.observe(lambda: (3, 1.5), lambda: services)
    text = generate_latest(metrics.registry).decode()
    assert 'gantline_condition{namespace="ns",reason="Ready",service="chat",type="Ready"} 1.0' in text
    assert 'reason="x",service="chat",type="PlanResolved"} -1.0' in text
    assert "gantline_queue_depth 3.0" in text
    services.clear()
    assert "chat" not in generate_latest(metrics.registry).decode()


def test_metrics_and_health_are_served(api_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install_crd(api_cluster)
    ports = {"metrics_port": free_port(), "health_port": free_port()}
    stuck, counted = list[str](), "gantline_api_requests_total"
    monkeypatch.setattr("gantline_operator.controller.Controller.stuck_worker", lambda self: "".join(stuck))
    with Operator(api_cluster, replace(SETTINGS, watch_namespaces=(namespace,), **ports)):
        wait(lambda: b"gantline_services 0.0" in fetch(ports["metrics_port"], "/metrics"))
        wait(lambda: asked(ports["metrics_port"], "gantline_requeues_total", counted) == {counted})
        assert wait(lambda: fetch(ports["health_port"], "/healthz"))
    stuck.append("worker 1 has been busy for 999 s")
    with Operator(api_cluster, replace(SETTINGS, watch_namespaces=(namespace,), **ports)):
        wait(lambda: fetch(ports["health_port"], "/healthz") == b"500")


def asked(port: int, *names: str) -> set[str]:
    """Those of the metrics that there are, when no others are asked for."""
    lines = fetch(port, f"/metrics?{'&'.join(f'name[]={name}' for name in names)}").decode().splitlines()
    return {line.partition("{")[0] for line in lines if line[0] != "#"}


def fetch(port: int, path: str) -> bytes:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        return str(error.code).encode()
    except OSError:
        return b""
