"""What the network and a loaded API server do to an operator, by a proxy between the two (`faulty_network.py`).

The suite shortens the operator's patience, so that it can be outwaited; GANTLINE_FULL_MATRIX=1 waits as long as in production.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import kopf
import pytest
from aiohttp import web
from gantline_devcluster.api_only import ApiCluster
from gantline_operator import client as client_module
from gantline_operator import main as main_module
from gantline_operator.client import Client, parse
from gantline_operator.observe import CONFIG_MAPS, Mirror
from gantline_operator.resources import MANAGED_KINDS

from tests.operator.faulty_network import Fault, FaultyNetwork, is_listing, is_watch, is_write
from tests.operator.harness import (
    SETTINGS,
    TINY,
    Operator,
    apply,
    fates,
    get,
    inspected,
    install_crd,
    items,
    patch,
    server_pods,
    service,
    status,
    wait,
    wait_reason,
)
from tests.operator.killing import FULL, in_the_full_matrix
from tests.operator.oracle import assert_at_rest, assert_gone

ANSWER_S, SILENCE_S = (30.0, 75.0) if FULL else (1.0, 2.0)
"""How long the operator waits for an answer, and for the next word of a watch."""


@pytest.fixture(scope="module")
def world(api_cluster: ApiCluster) -> ApiCluster:
    install_crd(api_cluster)
    fates(api_cluster, inspected(**dict.fromkeys(("tiny", "other", "third"), TINY)))
    if not any(node["metadata"]["name"] == "cpu-0" for node in api_cluster.client.get("/api/v1/nodes").get("items") or []):
        api_cluster.simulate("cpu", 1)
    return api_cluster


@pytest.fixture
def network(world: ApiCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyNetwork]:
    if not FULL:
        _shorten_patience(monkeypatch)
    with FaultyNetwork(world) as between:
        yield between


def _shorten_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    original, settings_of = Client.__init__, main_module.kopf_settings

    def impatient(self: Client, configuration: Any, **_: Any) -> None:
        original(self, configuration, request_timeout_s=ANSWER_S)

    def settings() -> kopf.OperatorSettings:
        made = settings_of()
        made.watching.inactivity_timeout, made.networking.request_timeout = SILENCE_S, ANSWER_S
        return made

    monkeypatch.setattr(Client, "__init__", impatient)
    monkeypatch.setattr(main_module, "kopf_settings", settings)
    monkeypatch.setattr(client_module, "SILENCE_S", SILENCE_S)


def _operator(world: ApiCluster, network: FaultyNetwork, namespace: str) -> Operator:
    return Operator(world, replace(SETTINGS, watch_namespaces=(namespace,)), kubeconfig=network.kubeconfig)


def test_refused_late_and_lost_answers_are_outlasted(world: ApiCluster, network: FaultyNetwork, namespace: str) -> None:
    """Every other request of the operator meets one of them, while it creates two services and changes one."""
    turn = count()

    def every_other(request: web.BaseRequest) -> bool:
        return not is_watch(request) and next(turn) % 8 in (1, 3, 5, 7)

    kinds = (
        Fault("status", every_other, 503, times=6),
        Fault("lost", lambda request: is_write(request) and every_other(request), times=6),
        Fault("late", every_other, delay_s=ANSWER_S * 1.3, times=2),
        Fault("truncated", lambda request: request.method == "GET" and "/inferenceservices/" in request.path, times=2),
        Fault("status", every_other, 429, retry_after="1", times=4),
    )
    with network.fault(*kinds), _operator(world, network, namespace) as operator:
        apply(world, service("tiny", namespace), service("other", namespace))
        wait_reason(world, "tiny", namespace, "Ready", timeout_s=300 if FULL else 60)
        patch(world, "other", namespace, {"replicas": 2})
        assert_at_rest(world, namespace)
        assert not operator.dead.is_set()
    assert len(items(world, "jobs", namespace)) == 2, "an answer that was lost is no reason to do the work twice"
    assert kinds[0].met == 6 and kinds[1].met


@in_the_full_matrix
def test_a_server_that_asks_for_patience_gets_it(world: ApiCluster, network: FaultyNetwork, namespace: str) -> None:
    """429 with Retry-After, as API priority and fairness answers where a client asks too much."""
    refused = Fault("status", lambda request: "/serviceaccounts/tiny-runtime" in request.path, 429, retry_after="2", times=1)
    with network.fault(refused), _operator(world, network, namespace):
        began = len(network.requests)
        apply(world, service("tiny", namespace))
        wait(lambda: refused.met)
        moment = time.monotonic()
        wait(lambda: sum("/serviceaccounts/tiny-runtime" in path for _, path in network.requests[began:]) > 1)
        assert time.monotonic() - moment > 1.5
        assert_at_rest(world, namespace)


def test_what_happened_while_watches_were_cut_is_seen_after_a_forced_relist(
    world: ApiCluster, network: FaultyNetwork, namespace: str
) -> None:
    """Deletions above all: a relist does not tell of them."""

    def names(plural: str) -> set[str]:
        return {item["metadata"]["name"] for item in items(world, plural, namespace)}

    with _operator(world, network, namespace) as operator:
        apply(world, *(service(name, namespace) for name in ("tiny", "other", "third")))
        assert_at_rest(world, namespace)
        with network.fault(Fault("status", is_listing, 503)):
            network.cut()
            world.kubectl("delete", "deployment/tiny", "gisvc/other", "-n", namespace, "--wait=false")
            world.kubectl("delete", "service/third", "-n", namespace)
            world.kubectl("scale", "deployment/third", "--replicas=2", "-n", namespace)
            wait(lambda: "other" not in names("inferenceservices") and "tiny" not in names("deployments"))
        too_old = Fault("expired", is_watch, times=24)
        with network.fault(too_old):
            wait(lambda: too_old.met == too_old.times, what=lambda: too_old.met)
        # Whoever lists again finds the parents, and looks at each: so also at what only a deletion would have told of.
        assert_at_rest(world, namespace)
        assert names("inferenceservices") == {"third", "tiny"}
        assert not operator.dead.is_set()


def test_after_an_outage_it_is_back_within_seconds_however_long_that_was(world: ApiCluster, network: FaultyNetwork, namespace: str) -> None:
    """Of the operator alone: it is cut off, the controllers and the scheduler are not. They need half a minute and more to come back from
    an outage of the API server itself."""
    with _operator(world, network, namespace) as operator:
        apply(world, service("tiny", namespace))
        wait_reason(world, "tiny", namespace, "Ready")
        with network.fault(Fault("refused", lambda request: True)):
            patch(world, "tiny", namespace, {"replicas": 2})  # the event is the last that comes through: it is tried in vain
            network.cut()
            assert not operator.dead.wait(16.0)
            network.requests.clear()
            apply(world, service("other", namespace))
            time.sleep(4.0)
            asked = {path.partition("?")[0].rpartition("/")[2] for _, path in network.requests}
        watched = {"inferenceservices", "pods", *(kind.plural for kind in MANAGED_KINDS if not kind.optional)}
        assert asked >= watched, f"these wait for longer: {watched - asked}"
        back = time.monotonic()
        wait(lambda: get(world, "deployments", "tiny", namespace)["spec"]["replicas"] == 2, timeout_s=30)
        wait(lambda: any(pod["spec"].get("nodeName") for pod in server_pods(world, "other", namespace)), timeout_s=30)
        # 2 s until its watches are back, 5 until what it tried in vain is tried again; the rest is what a service takes.
        assert time.monotonic() - back < 10.0
        assert_at_rest(world, namespace)


def test_a_child_that_vanished_while_only_its_watch_was_cut_is_made_again(
    world: ApiCluster, network: FaultyNetwork, namespace: str
) -> None:
    """No event tells of it, and nobody lists the services again: the new list of its kind lacks it."""

    def is_of_services(request: web.BaseRequest) -> bool:
        return request.path == f"/api/v1/namespaces/{namespace}/services"

    with _operator(world, network, namespace) as operator:
        apply(world, service("tiny", namespace), service("other", namespace))
        assert_at_rest(world, namespace)
        with network.fault(Fault("status", is_of_services, 503)):
            network.cut()
            world.kubectl("delete", "service/tiny", "-n", namespace)
        too_old = Fault("expired", lambda request: is_watch(request) and is_of_services(request), times=1)
        operator.reconciled.clear()
        with network.fault(too_old):
            wait(lambda: too_old.met)
        wait(lambda: [item["metadata"]["name"] for item in items(world, "services", namespace)] == ["other", "tiny"])
        assert_at_rest(world, namespace)
        assert not operator.dead.is_set()


async def test_a_watch_of_a_kind_that_nothing_happens_to_is_made_anew_without_a_list(
    world: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An API server sends no bookmarks before it has seen an event of the kind."""
    monkeypatch.setattr(client_module, "SILENCE_S", 0.5)
    client = await client_module.connect(str(world.kubeconfig))
    lists: list[str] = []
    told = asyncio.Event()
    send = client._send

    async def watched(method: str, path: str, **arguments: Any) -> bytes:
        lists.append(path)
        return await send(method, path, **arguments)

    monkeypatch.setattr(client, "_send", watched)
    mirror = Mirror(client, CONFIG_MAPS, parse, lambda before, after: told.set(), namespace=namespace, name="told")
    watching = asyncio.create_task(mirror.run())
    await asyncio.sleep(3)
    assert len(lists) == 1
    await asyncio.to_thread(world.kubectl, "create", "configmap", "told", "-n", namespace)
    await asyncio.wait_for(told.wait(), 10)
    assert len(lists) == 1
    watching.cancel()
    await asyncio.wait([watching])
    await client.close()


@in_the_full_matrix
def test_connections_that_fall_silent_are_given_up_and_made_anew(world: ApiCluster, network: FaultyNetwork, namespace: str) -> None:
    with _operator(world, network, namespace) as operator:
        apply(world, service("tiny", namespace))
        wait_reason(world, "tiny", namespace, "Ready")
        with network.black_hole():
            patch(world, "tiny", namespace, {"replicas": 2})
            world.kubectl("delete", "service/tiny", "-n", namespace)
            apply(world, service("other", namespace))
            assert not operator.dead.wait(ANSWER_S + SILENCE_S)
        wait(lambda: status(world, "other", namespace), timeout_s=30)
        assert_at_rest(world, namespace)
        assert get(world, "deployments", "tiny", namespace)["spec"]["replicas"] == 2
        world.kubectl("delete", "gisvc", "--all", "-n", namespace, "--wait=false")
        assert_gone(world, namespace)


@in_the_full_matrix
def test_two_operators_and_a_stranger_who_write_at_once_end_as_one(world: ApiCluster, namespace: str) -> None:
    """As in the moment of an upgrade, with somebody at the keyboard who takes fields over."""
    stop = threading.Event()

    def meddle() -> None:
        for replicas in (number % 4 for number in count()):
            if stop.wait(0.2):
                return
            world.kubectl("scale", "deployment/tiny", f"--replicas={replicas}", "-n", namespace, check=False)

    settings = replace(SETTINGS, watch_namespaces=(namespace,))
    stranger = threading.Thread(target=meddle)
    with Operator(world, settings) as one, Operator(world, settings) as other:
        stranger.start()
        try:
            apply(world, service("tiny", namespace), service("other", namespace))
            wait_reason(world, "other", namespace, "Ready")
            patch(world, "tiny", namespace, {"engine": {"maxBatchSize": 3}})
            wait(lambda: len([path for _, path in one.writes + other.writes if path.endswith("/deployments/tiny")]) > 8)
        finally:
            stop.set()
            stranger.join(30)
        wait_reason(world, "tiny", namespace, "Ready")
        assert_at_rest(world, namespace)
        assert len(items(world, "jobs", namespace)) == 2
