"""When a revision is given up and what serves then; how a revision takes over. Pure, and on the real API server."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_operator.claim_sharing import Sharing
from gantline_operator.conditions import Reason
from gantline_operator.pod_state import Trouble
from gantline_operator.rollback import RolloutRecord, advance
from gantline_operator.rollout_strategy import Strategy, choose_strategy
from gantline_operator.status import Rollout

from tests.operator.harness import (
    FACTS,
    TINY,
    answer,
    apply,
    event_reasons,
    fates,
    get,
    gpu_nodes,
    inspected,
    install_crd,
    items,
    patch,
    path_of,
    remove_gpu_nodes,
    server_pods,
    service,
    serving,
    settled,
    status,
    volume,
    wait,
    wait_reason,
)
from tests.operator.oracle import assert_at_rest
from tests.operator.planning import accepted, cluster_of, spec_of
from tests.operator.test_status import pod

UP = Rollout(seen=True, wanted=1, replicas=1, updated=1, ready=1)
COMING = replace(UP, ready=0)
LATE = replace(COMING, deadline_passed=True)
GOOD = RolloutRecord(good="r0")


def broken(reason: Reason, restarts: int) -> Any:
    return pod(ready=False, revision="r1", restarts=restarts, trouble=Trouble(reason, "It is broken."))


@pytest.mark.parametrize(
    ("record", "rollout", "pods", "expected"),
    [
        (GOOD, UP, [pod(revision="r1")], RolloutRecord(good="r1")),
        (GOOD, COMING, [pod(ready=False, revision="r1")], GOOD),
        (GOOD, COMING, [broken(Reason.ENGINE_CRASH_LOOP, 2)], GOOD),
        (GOOD, COMING, [broken(Reason.ENGINE_CRASH_LOOP, 3)], RolloutRecord("r0", "r1", "It is broken.")),
        (GOOD, COMING, [broken(Reason.INVALID_CONFIGURATION, 1)], RolloutRecord("r0", "r1", "It is broken.")),
        (GOOD, COMING, [broken(Reason.SMOKE_REQUEST_FAILED, 1)], RolloutRecord("r0", "r1", "It is broken.")),
        (GOOD, COMING, [broken(Reason.WAITING_FOR_CAPACITY, 9)], GOOD),
        (GOOD, LATE, [broken(Reason.WAITING_FOR_CAPACITY, 0)], GOOD),
        (GOOD, LATE, [broken(Reason.IMAGE_PULL_FAILED, 0)], RolloutRecord("r0", "r1", "It is broken.")),
        (GOOD, LATE, [], GOOD),
        (GOOD, LATE, [pod(revision="r1")], GOOD),
        (GOOD, replace(LATE, seen=False), [broken(Reason.ENGINE_CRASH_LOOP, 9)], GOOD),
        (GOOD, replace(UP, wanted=0, replicas=0, updated=0, ready=0), [], GOOD),
        (RolloutRecord(), COMING, [broken(Reason.ENGINE_CRASH_LOOP, 9)], RolloutRecord()),
        (RolloutRecord(good="r1"), COMING, [broken(Reason.ENGINE_CRASH_LOOP, 9)], RolloutRecord(good="r1")),
        (RolloutRecord("r0", "r-1", "Old."), UP, [pod(revision="r1")], RolloutRecord(good="r1")),
    ],
)
def test_a_revision_is_given_up_only_for_what_it_cannot_mend(record: Any, rollout: Any, pods: Any, expected: Any) -> None:
    assert advance(record, "r1", rollout, pods) == expected


def test_a_late_revision_without_a_visible_cause_is_given_up_for_being_late() -> None:
    found = advance(GOOD, "r1", LATE, [pod(ready=False, revision="r1")])
    assert found.failed == "r1" and "predicted time" in found.cause
    assert RolloutRecord.from_status(found.to_status()) == found


@pytest.mark.parametrize(
    ("profile", "spec", "sharing", "expected", "why"),
    [
        ("h100", {}, Sharing.ANY, "Surge", "free"),
        ("cpu", {"accelerator": {"resource": "cpu"}}, Sharing.ANY, "Surge", "CPU"),
        ("h100", {}, Sharing.ONE_NODE, "Drain", "volume"),
        ("h100", {"rollout": {"strategy": "Surge"}}, Sharing.ONE_POD, "Drain", "ReadWriteOncePod"),
        ("h100", {"rollout": {"strategy": "Drain"}}, Sharing.ANY, "Drain", "says so"),
        ("cpu", {"accelerator": {"resource": "cpu"}, "rollout": {"strategy": "Surge"}}, Sharing.ONE_NODE, "Surge", "says so"),
    ],
)
def test_auto_surges_where_there_is_room(profile: str, spec: Any, sharing: Sharing, expected: str, why: str) -> None:
    cluster = cluster_of(profile)
    planned = accepted("tiny" if profile == "cpu" else "8b", cluster, **spec)
    found = choose_strategy(spec_of(**spec), planned, cluster, sharing=sharing)
    assert found.name == expected and why in found.why


def test_auto_drains_where_every_gpu_is_taken_or_nobody_knows() -> None:
    cluster = cluster_of("h100")
    planned = accepted("8b", cluster)
    for free, why in ((0, "has 1 nvidia.com/gpu free"), (None, "not known")):
        nodes = tuple(replace(node, offers=tuple(replace(offer, free=free) for offer in node.offers)) for node in cluster.nodes)
        found = choose_strategy(spec_of(), planned, replace(cluster, nodes=nodes), sharing=Sharing.ANY)
        assert found.name == "Drain" and why in found.why


def test_a_revision_of_an_earlier_release_goes_on_as_it_began() -> None:
    assert Strategy.from_stored(None, on_cpu=True).name == "Surge"
    assert Strategy.from_stored({"name": "?"}, on_cpu=False).name == "Drain"


# -- on the real API server


@pytest.fixture(scope="module")
def world(api_cluster: ApiCluster) -> Iterator[ApiCluster]:
    install_crd(api_cluster)
    fates(api_cluster, inspected(**dict.fromkeys(("chat", "keeps", "slow"), TINY), gpu=FACTS))
    if not api_cluster.client.get("/api/v1/nodes").get("items"):
        api_cluster.simulate("cpu", 1)
    yield api_cluster


def _break_next(cluster: ApiCluster, name: str) -> None:
    fates(cluster, [("server", name, "crash-loop", answer("InvalidConfiguration", message="No such flag."), {})])


def test_a_revision_that_cannot_start_is_rolled_back_and_not_tried_again_until_the_spec_changes(world: ApiCluster, namespace: str) -> None:
    with serving(world, namespace):
        apply(world, service("chat", namespace))
        wait_reason(world, "chat", namespace, "Ready")
        good = status(world, "chat", namespace)["revision"]
        assert status(world, "chat", namespace)["rollout"] == {
            "strategy": "Surge", "why": "A further pod takes only CPU and memory.", "good": good,
        }  # fmt: skip
        _break_next(world, "chat")
        patch(world, "chat", namespace, {"engine": {"maxBatchSize": 3}})
        wait_reason(world, "chat", namespace, "RolledBack", "Degraded")
        found = wait(lambda: _ready_of(world, "chat", namespace, good), what=lambda: status(world, "chat", namespace))
        conditions = {item["type"]: (item["status"], item["reason"], item["message"]) for item in found["conditions"]}
        assert conditions["Ready"][:2] == ("False", "RolledBack") and conditions["Servable"][0] == "True"
        assert conditions["Progressing"][:2] == ("False", "RolledBack")
        assert "No such flag." in conditions["Ready"][2] and "restartedAt" in conditions["Ready"][2]
        assert found["rollout"]["failed"] != good and found["rollout"]["good"] == good
        wait(lambda: settled(world, namespace, 1.0), what=lambda: "it flaps")
        wait(lambda: "RolledBack" in event_reasons(world, "chat", namespace))
        fates(world, [("server", "chat", "ready", "", {})])
        patch(world, "chat", namespace, {"engine": {"maxBatchSize": 5}})
        wait_reason(world, "chat", namespace, "Ready")
        found = status(world, "chat", namespace)
        assert found["rollout"]["good"] == found["revision"] != good and "failed" not in found["rollout"]


def test_however_many_revisions_fail_one_after_the_other_the_last_good_one_serves_again(world: ApiCluster, namespace: str) -> None:
    with serving(world, namespace):
        apply(world, service("chat", namespace))
        wait_reason(world, "chat", namespace, "Ready")
        good = status(world, "chat", namespace)["revision"]
        _break_next(world, "chat")
        failed = set[str]()
        for size in (3, 4, 5, 6):
            patch(world, "chat", namespace, {"engine": {"maxBatchSize": size}})
            wait(lambda: status(world, "chat", namespace)["rollout"].get("failed") not in (None, *failed))
            found = wait(lambda: _ready_of(world, "chat", namespace, good), what=lambda: status(world, "chat", namespace))
            failed.add(found["rollout"]["failed"])
        # It scales as ever, and nodes are drained of one replica at a time.
        fates(world, [("server", "chat", "ready", "", {})])
        patch(world, "chat", namespace, {"replicas": 2})
        wait(lambda: items(world, "poddisruptionbudgets", namespace))
        assert_at_rest(world, namespace)
        fates(world, [("server", "chat", "ready", "", {})])


def test_a_cache_stays_until_what_needs_it_no_more_has_proved_good(world: ApiCluster, namespace: str) -> None:
    """A volume ties its pods to one node, so the old ones are gone by the time that the new revision fails."""
    fetched = answer(artefact={"kind": "fetch", "bytes": TINY["weightBytes"]})
    fates(world, [*inspected(moves={**TINY, "revision": "abc"}), ("fetch", "moves", "complete", fetched, {})])
    volume(world, namespace, "moves-cache")
    claims = lambda: [item["metadata"] for item in items(world, "persistentvolumeclaims", namespace)]
    with serving(world, namespace):
        apply(world, service("moves", namespace, model={"uri": "hf://org/name"}))
        wait_reason(world, "moves", namespace, "Ready")
        good, (claim,) = status(world, "moves", namespace)["revision"], claims()
        _break_next(world, "moves")
        patch(world, "moves", namespace, {"model": {"uri": "file:///models/tiny"}})
        wait_reason(world, "moves", namespace, "RolledBack", "Degraded")
        wait(lambda: _ready_of(world, "moves", namespace, good), what=lambda: status(world, "moves", namespace))
        (kept,) = claims()
        assert kept["uid"] == claim["uid"] and "deletionTimestamp" not in kept
        fates(world, [("server", "moves", "ready", "", {})])
        patch(world, "moves", namespace, {"engine": {"maxBatchSize": 4}})
        wait_reason(world, "moves", namespace, "Ready")
        wait(lambda: not claims(), what=claims)


def test_a_cache_that_somebody_deletes_is_gone_with_the_last_pod_that_serves_and_made_anew(world: ApiCluster, namespace: str) -> None:
    """Pods of Jobs that have ended hold a claim as others do, and they stay for a day."""
    fetched = answer(artefact={"kind": "fetch", "bytes": TINY["weightBytes"]})
    fates(world, [*inspected(loses={**TINY, "revision": "abc"}), ("fetch", "loses", "complete", fetched, {})])
    volume(world, namespace, "loses-cache")
    claims = lambda: [item["metadata"] for item in items(world, "persistentvolumeclaims", namespace)]
    with serving(world, namespace):
        apply(world, service("loses", namespace, model={"uri": "hf://org/name"}))
        wait_reason(world, "loses", namespace, "Ready")
        (claim,) = claims()
        world.kubectl("delete", "pvc", "loses-cache", "-n", namespace, "--wait=false")
        time.sleep(1)
        assert [item["uid"] for item in claims()] == [claim["uid"]] and server_pods(world, "loses", namespace)
        patch(world, "loses", namespace, {"replicas": 0})
        wait(lambda: [item["uid"] for item in claims()] not in ([claim["uid"]], []), what=claims)


def _ready_of(cluster: ApiCluster, name: str, namespace: str, revision: str) -> Any:
    """The status once only pods of `revision` are there, and ready."""
    found = status(cluster, name, namespace)
    pods = server_pods(cluster, name, namespace)
    marks = {pod["metadata"]["labels"]["gantline.io/revision"] for pod in pods}
    return found if found["revision"] == revision and marks == {revision} and found["readyReplicas"] == 1 else None


def test_a_revision_that_is_late_or_fails_its_smoke_request_is_rolled_back_while_the_service_stays_servable(
    world: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that comes while the service is paused is not even tried."""
    rendering = importlib.import_module("gantline_operator.resources.serving")
    monkeypatch.setattr(rendering, "startup_budget_s", lambda plan: 5)
    monkeypatch.setattr(rendering, "_PULL_ALLOWANCE_S", 0)
    smoke = answer("SmokeRequestFailed", message="the smoke request failed: no token came back")
    path = path_of("inferenceservices", namespace)

    def servable(wanted: Callable[[dict[str, Any]], object]) -> bool:
        conditions = {item["type"]: item for item in status(world, "slow", namespace)["conditions"]}
        assert conditions["Servable"]["status"] == "True"
        return bool(wanted(conditions))

    with serving(world, namespace):
        apply(world, service("slow", namespace))
        wait_reason(world, "slow", namespace, "Ready")
        good = status(world, "slow", namespace)["revision"]
        ends = (("never-ready", "", "predicted time"), ("crash-loop", smoke, "no token came back"))
        for number, (how, message, words) in enumerate(ends):
            fates(world, [("server", "slow", how, message, {})])
            patch(world, "slow", namespace, {"engine": {"maxBatchSize": 3 + number}})
            rolled_back = lambda found, words=words: found["Ready"]["reason"] == "RolledBack" and words in found["Ready"]["message"]
            wait(lambda wanted=rolled_back: servable(wanted))
            wait(lambda: _ready_of(world, "slow", namespace, good), what=lambda: status(world, "slow", namespace))
            assert_at_rest(world, namespace)
        assert event_reasons(world, "slow", namespace).count("RolledBack") == 2, "it does not flap"
        before = {pod["metadata"]["uid"] for pod in server_pods(world, "slow", namespace)}
        world.kubectl("annotate", "gisvc/slow", "-n", namespace, "gantline.io/paused=true")
        world.client.call("PATCH", f"{path}/slow", {"spec": {"engine": {"maxBatchSize": 9}}}, content_type="application/merge-patch+json")
        wait(lambda: servable(lambda found: found["Ready"]["reason"] == "Paused" and found["Ready"]["observedGeneration"] == 4))
        assert {pod["metadata"]["uid"] for pod in server_pods(world, "slow", namespace)} == before
        fates(world, [("server", "slow", "ready", "", {})])


def test_without_auto_rollback_a_broken_revision_stays(world: ApiCluster, namespace: str) -> None:
    with serving(world, namespace) as operator:
        apply(world, service("keeps", namespace, rollout={"autoRollback": False, "strategy": "Drain"}))
        wait_reason(world, "keeps", namespace, "Ready")
        assert get(world, "deployments", "keeps", namespace)["spec"]["strategy"] == {"type": "Recreate"}
        _break_next(world, "keeps")
        patch(world, "keeps", namespace, {"engine": {"maxBatchSize": 3}})
        wait_reason(world, "keeps", namespace, "InvalidConfiguration")
        found = status(world, "keeps", namespace)
        assert found["rollout"]["failed"] == found["revision"], "what was found out is said all the same"
        wait(lambda: settled(world, namespace, 1.0))
        looked = len(operator.reconciled)
        time.sleep(2)
        assert len(operator.reconciled) - looked < 4, "nothing is to be done, and nobody keeps looking"
        fates(world, [("server", "keeps", "ready", "", {})])


def test_with_a_free_gpu_a_revision_surges_and_the_strategy_stands_when_it_is_taken(world: ApiCluster, namespace: str) -> None:
    place = gpu_nodes(world, namespace, "h100")
    try:
        with serving(world, namespace):
            apply(world, service("gpu", namespace, **place))
            wait_reason(world, "gpu", namespace, "Ready")
            found = status(world, "gpu", namespace)["rollout"]
            assert found["strategy"] == "Surge" and "nvidia.com/gpu free" in found["why"]
            deployment = get(world, "deployments", "gpu", namespace)["spec"]["strategy"]
            assert deployment["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    finally:
        remove_gpu_nodes(world, namespace)
