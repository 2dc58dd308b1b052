"""What happens to operators in real clusters. Each fault ends in one oracle: live == desired, nothing extra, nothing moves any more."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_operator import apply as apply_module
from gantline_operator import controller as controller_module
from gantline_operator import stages
from gantline_operator.client import connect
from gantline_operator.conditions import Reason
from gantline_operator.controller import Controller
from gantline_operator.reconcile_pass import SERVICES

from tests.operator.harness import (
    FACTS,
    SETTINGS,
    TINY,
    Operator,
    answer,
    apply,
    assert_converged,
    children,
    copied,
    fate,
    fates,
    get,
    gpu_nodes,
    inspected,
    install_crd,
    items,
    patch,
    remove_gpu_nodes,
    service,
    serving,
    status,
    versions,
    volume,
    wait,
    wait_reason,
)

OUTAGE_S = 30 if os.environ.get("GANTLINE_FULL_MATRIX") == "1" else 2


@pytest.fixture(scope="module")
def world(api_cluster: ApiCluster) -> ApiCluster:
    install_crd(api_cluster)
    fates(
        api_cluster,
        [
            *inspected(tiny=TINY, retried=FACTS),
            ("quantize", "retried", "evicted", "", {}),
            ("inspect", "limited", "failed", answer("DownloadRateLimited", message="429 from the hub."), {"exit_code": 75}),
        ],
    )
    return api_cluster


@pytest.fixture
def cluster(world: ApiCluster, namespace: str) -> Iterator[ApiCluster]:
    if not any(node["metadata"]["name"] == "cpu-0" for node in world.client.get("/api/v1/nodes").get("items") or []):
        world.simulate("cpu", 1)
    yield world
    remove_gpu_nodes(world, namespace)


def expected(cluster: ApiCluster, namespace: str, name: str = "tiny") -> list[str]:
    """The children of a service on a CPU."""
    found = status(cluster, name, namespace)
    source, revision = found["model"]["inputs"], found["revision"]
    return [
        f"serviceaccounts/{name}-runtime",
        f"services/{name}",
        f"jobs/{name}-inspect-{source}",
        f"deployments/{name}",
        f"controllerrevisions/{name}-{revision}",
    ]


def assert_whole(cluster: ApiCluster, namespace: str, name: str = "tiny") -> None:
    wait_reason(cluster, name, namespace, "Ready")
    assert_converged(cluster, name, namespace, expected(cluster, namespace, name))


class Killed(BaseException):
    """As a SIGKILL between two writes: nothing of that operator runs afterwards."""


async def reconcile_until_killed(kubeconfig: Path, namespace: str, writes: int) -> int:
    """Reconciles the service `tiny` again and again until the process would have died after so many writes; how many there were."""
    client = await connect(str(kubeconfig))
    send, done = client._send, 0

    async def mortal(method: str, path: str, **arguments: Any) -> bytes:
        nonlocal done
        result = await send(method, path, **arguments)
        done += method != "GET"
        if method != "GET" and done == writes:
            raise Killed
        return result

    client._send = mortal  # type: ignore[method-assign]
    controller = Controller(client, replace(SETTINGS, observe_nodes="never"), "1")
    try:
        while reason_of(await client.get(SERVICES, namespace, "tiny")) != "Ready":
            await controller.reconcile((namespace, "tiny"))
            await asyncio.sleep(0.1)
    except Killed:
        pass
    finally:
        await client.close()
    return done


def reason_of(parent: dict[str, Any]) -> str:
    conditions = {item["type"]: item["reason"] for item in parent.get("status", {}).get("conditions", [])}
    return str(conditions.get("Ready", ""))


async def test_an_operator_killed_between_any_two_writes_leaves_a_state_that_the_next_one_finishes(
    cluster: ApiCluster, namespace: str
) -> None:
    """Every k at once, each in a namespace of its own, after a run that tells how many writes there are."""
    apply(cluster, service("tiny", namespace))
    total = await reconcile_until_killed(cluster.kubeconfig, namespace, 10**6)
    assert total >= 10
    names = {k: f"{namespace}-{k}" for k in range(1, total)}
    for name in names.values():
        cluster.client.post("/api/v1/namespaces", {"metadata": {"name": name}})
    await asyncio.to_thread(apply, cluster, *(service("tiny", name) for name in names.values()))
    done = await asyncio.gather(*(reconcile_until_killed(cluster.kubeconfig, name, k) for k, name in names.items()))
    # Steps that do not depend on each other fall together differently from run to run, so the last few may not be reached.
    assert [count for count, k in zip(done, names, strict=True) if k <= 10] == list(range(1, 11))
    await asyncio.to_thread(assert_finished_by_the_next, cluster, list(names.values()))
    for name in names.values():
        cluster.client.call("DELETE", f"/api/v1/namespaces/{name}")


def assert_finished_by_the_next(cluster: ApiCluster, namespaces: list[str]) -> None:
    with Operator(cluster, replace(SETTINGS, watch_namespaces=tuple(namespaces))):
        for name in namespaces:
            wait_reason(cluster, "tiny", name, "Ready")
        for name in namespaces:  # by the time of the last one all have long been at rest
            assert_converged(cluster, "tiny", name, expected(cluster, name), quiet_s=0.1)


def test_a_real_process_that_is_killed_is_continued_by_the_next(cluster: ApiCluster, namespace: str) -> None:
    environment = {
        **os.environ,
        "KUBECONFIG": str(cluster.kubeconfig),
        "GANTLINE_WATCH_NAMESPACES": namespace,
        "GANTLINE_IMAGE_CPU": SETTINGS.image_cpu,
        "GANTLINE_METRICS_PORT": "0",
        "GANTLINE_HEALTH_PORT": "0",
    }
    process = subprocess.Popen([sys.executable, "-m", "gantline_operator.main"], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        apply(cluster, service("tiny", namespace))
        wait(lambda: items(cluster, "jobs", namespace))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with serving(cluster, namespace):
        assert_whole(cluster, namespace)


def test_a_late_definition_and_an_outage_of_the_api_server_are_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster of its own, since others' watches would be cut too; without controllers, so nothing but the operator acts."""

    def seen(name: str) -> bool:
        parent = get(cluster, "gisvc", name, "default")
        return bool(parent.get("status", {}).get("observedGeneration") == parent["metadata"]["generation"])

    monkeypatch.setattr(controller_module, "_LISTING_RETRY_S", 0.2)
    with ApiCluster(controllers=False) as cluster:
        early = Operator(cluster).__enter__()
        assert not early.dead.wait(1.0), "without its definition an operator waits"
        install_crd(cluster)
        assert early.dead.wait(30), "and ends when it appears: kopf looks for kinds once"
        assert isinstance(early.error, ExceptionGroup)
        assert early.error.subgroup(controller_module.DefinitionAppeared)
        with Operator(cluster) as operator:
            apply(cluster, service("tiny", "default"))
            wait(lambda: seen("tiny"))
            cluster.stop_apiserver()
            assert not operator.dead.wait(OUTAGE_S)
            cluster.start_apiserver()
            apply(cluster, service("late", "default"))
            patch(cluster, "tiny", "default", {"replicas": 2})
            wait(lambda: seen("tiny") and seen("late"))
            assert len(items(cluster, "jobs", "default")) == 2
            cluster.kubectl("delete", "job", "--all")
            wait(lambda: len(items(cluster, "jobs", "default")) == 2)
            assert not operator.dead.is_set()


def test_a_child_that_is_edited_deleted_or_stripped_of_its_labels_comes_back_as_it_was(cluster: ApiCluster, namespace: str) -> None:
    with serving(cluster, namespace):
        apply(cluster, service("tiny", namespace))
        assert_whole(cluster, namespace)
        wanted = expected(cluster, namespace)
        spec = get(cluster, "deployment", "tiny", namespace)["spec"]
        cluster.kubectl("scale", "deployment/tiny", "--replicas=3", "-n", namespace)
        wait(lambda: get(cluster, "deployment", "tiny", namespace)["spec"] == spec)
        for kind in ("service", "deployment", "serviceaccount", "controllerrevision"):
            name = {"serviceaccount": "tiny-runtime", "controllerrevision": wanted[-1].split("/")[1]}.get(kind, "tiny")
            cluster.kubectl("delete", kind, name, "-n", namespace)
        wait(lambda: children(cluster, namespace) == wanted, what=lambda: children(cluster, namespace))
        assert get(cluster, "deployment", "tiny", namespace)["spec"] == spec
        cluster.kubectl("label", "service/tiny", "-n", namespace, "app.kubernetes.io/managed-by-", "gantline.io/service-")
        wait(lambda: get(cluster, "service", "tiny", namespace)["metadata"]["labels"].get("gantline.io/service") == "tiny")
        job = items(cluster, "jobs", namespace)[0]["metadata"]["name"]
        cluster.kubectl("delete", "job", job, "-n", namespace)
        wanted = [name for name in wanted if not name.startswith("jobs/")]
        assert_converged(cluster, "tiny", namespace, wanted)


def test_a_service_deleted_and_created_again_under_its_name_gets_its_own_children(cluster: ApiCluster, namespace: str) -> None:
    with serving(cluster, namespace):
        apply(cluster, service("tiny", namespace))
        wait_reason(cluster, "tiny", namespace, "Ready")
        before = {item["metadata"]["uid"] for plural in ("jobs", "deployments", "services") for item in items(cluster, plural, namespace)}
        cluster.kubectl("delete", "gisvc/tiny", "-n", namespace, "--wait=false")
        apply(cluster, service("tiny", namespace))
        assert_whole(cluster, namespace)
        after = {item["metadata"]["uid"] for plural in ("jobs", "deployments", "services") for item in items(cluster, plural, namespace)}
        assert not before & after


def test_a_strangers_object_of_our_name_is_left_alone_and_named(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply_module, "_SLOW_RETRY_S", 1.0)
    monkeypatch.setattr(apply_module.Problem, "retry_s", 1.0)
    stranger = {"metadata": {"name": "tiny", "labels": {"app": "other"}}, "spec": {"ports": [{"port": 99}], "clusterIP": "None"}}
    made = cluster.client.post(f"/api/v1/namespaces/{namespace}/services", stranger)
    with serving(cluster, namespace):
        apply(cluster, service("tiny", namespace))
        found = wait_reason(cluster, "tiny", namespace, "NameConflict")
        assert "Service tiny exists and is not ours" in found["message"]
        assert get(cluster, "service", "tiny", namespace)["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
        cluster.kubectl("delete", "service", "tiny", "-n", namespace)
        cluster.kubectl("annotate", "gisvc/tiny", "-n", namespace, "look=again")
        assert_whole(cluster, namespace)


def test_a_quantize_job_killed_half_way_is_started_anew_while_the_old_revision_serves(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reason in (Reason.POD_EVICTED, Reason.POD_KILLED):
        monkeypatch.setitem(stages._PASSES, reason, (0.5, 1.0))  # type: ignore[index]
    place = gpu_nodes(cluster, namespace, "l4")
    volume(cluster, namespace, "retried-cache")
    with serving(cluster, namespace):
        apply(cluster, service("retried", namespace, **place))
        wait_reason(cluster, "retried", namespace, "Ready")
        patch(cluster, "retried", namespace, {"quantization": {"method": "awq"}})
        assert wait_reason(cluster, "retried", namespace, "Available", "Servable")["status"] == "True"
        wait(lambda: len(items(cluster, "jobs", namespace)) >= 3, what=lambda: children(cluster, namespace))
        condition = {item["type"]: item for item in status(cluster, "retried", namespace)["conditions"]}
        assert condition["Servable"]["status"] == "True"
        assert condition["QuantizationReady"]["status"] == "False"
        fate(cluster, "quantize", "retried", "complete", copied())
        wait_reason(cluster, "retried", namespace, "Ready")
        names = [job["metadata"]["name"] for job in items(cluster, "jobs", namespace) if "-quantize-" in job["metadata"]["name"]]
        assert len(names) == len(set(names)) >= 2
        assert any(name.endswith("-1") for name in names)


def test_what_may_pass_is_retried_later_and_says_when(cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stages._PASSES, Reason.DOWNLOAD_RATE_LIMITED, (3.0, 60.0))  # type: ignore[index]
    with serving(cluster, namespace):
        apply(cluster, service("limited", namespace, model={"uri": "hf://org/name"}))
        found = wait_reason(cluster, "limited", namespace, "DownloadRateLimited")
        assert "Trying again at" in found["message"]
        assert wait_reason(cluster, "limited", namespace, "Retrying", "Progressing")["status"] == "True"
        wait(lambda: len(items(cluster, "jobs", namespace)) == 2, what=lambda: children(cluster, namespace, "jobs"))


def test_a_full_disk_is_told_and_tried_again_until_there_is_room(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stages._PASSES, Reason.DISK_FULL, (0.5, 1.0))  # type: ignore[index]
    full = answer("DiskFull", message="No room.", cure="Enlarge it.")
    fates(cluster, [*inspected(packed={**TINY, "revision": "abc123"}), ("fetch", "packed", "failed", full, {"exit_code": 74})])
    volume(cluster, namespace, "packed-cache")
    with serving(cluster, namespace):
        apply(cluster, service("packed", namespace, model={"uri": "hf://org/name"}))
        assert "No room. Nothing is left to evict" in wait_reason(cluster, "packed", namespace, "DiskFull")["message"]
        assert wait_reason(cluster, "packed", namespace, "DiskFull", "ModelReady")["status"] == "False"
        fate(cluster, "fetch", "packed", "complete", answer(artefact={"kind": "fetch", "bytes": 11_000_000}))
        wait_reason(cluster, "packed", namespace, "Ready")
        jobs = [job["metadata"]["name"] for job in items(cluster, "jobs", namespace) if "-fetch-" in job["metadata"]["name"]]
        assert len(jobs) >= 2, "each attempt is a Job of its own, which keeps its log"


def test_a_quota_that_refuses_a_child_is_a_condition_and_heals(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply_module, "_SLOW_RETRY_S", 1.0)
    path = f"/api/v1/namespaces/{namespace}/resourcequotas"
    cluster.client.post(path, {"metadata": {"name": "tight"}, "spec": {"hard": {"count/deployments.apps": "0"}}})
    wait(lambda: cluster.client.get(f"{path}/tight").get("status", {}).get("hard"))
    with serving(cluster, namespace):
        apply(cluster, service("tiny", namespace))
        found = wait_reason(cluster, "tiny", namespace, "Forbidden")
        assert "exceeded quota" in found["message"]
        cluster.client.call("DELETE", f"{path}/tight")
        cluster.kubectl("annotate", "gisvc/tiny", "-n", namespace, "look=again")
        assert_whole(cluster, namespace)


def test_a_new_operator_restarts_no_pod(cluster: ApiCluster, namespace: str) -> None:
    with serving(cluster, namespace):
        apply(cluster, service("tiny", namespace))
        assert_whole(cluster, namespace)
    before = get(cluster, "deployment", "tiny", namespace)["spec"]["template"]
    untouched = versions(cluster, namespace)
    with serving(cluster, namespace, image_cpu="registry.example/gantline-runtime-cpu:next") as newer:
        wait(lambda: len(newer.writes) >= 3)
        assert get(cluster, "deployment", "tiny", namespace)["spec"]["template"] == before
        assert versions(cluster, namespace) == untouched
        cluster.kubectl("annotate", "gisvc/tiny", "-n", namespace, "gantline.io/restartedAt=now")
        wait(lambda: json.dumps(get(cluster, "deployment", "tiny", namespace)["spec"]["template"]).count(":next"))
        wait_reason(cluster, "tiny", namespace, "Ready")


def test_the_operator_works_under_the_charts_own_rights(cluster: ApiCluster, namespace: str) -> None:
    """Namespaced, without a look at nodes: the least that the chart can be installed with."""
    from tests.operator.helm import render

    values = {"rbac": {"scope": "namespace", "readNodes": False, "userRoles": False}, "watchNamespaces": [namespace]}
    wanted = {"ServiceAccount", "Role", "RoleBinding"}
    objects = [
        item
        for item in render(values, namespace=namespace)
        if item["kind"] in wanted and "helm.sh/hook" not in item["metadata"].get("annotations", {})
    ]
    for item in objects:
        item["metadata"].setdefault("namespace", namespace)
    apply(cluster, *objects)
    account = next(item["metadata"]["name"] for item in objects if item["kind"] == "ServiceAccount")
    kubeconfig: Path = cluster.service_account_kubeconfig(namespace, account)
    with Operator(cluster, replace(SETTINGS, watch_namespaces=(namespace,)), kubeconfig=kubeconfig):
        apply(cluster, service("tiny", namespace))
        assert_whole(cluster, namespace)
        assert {item["reason"] for item in items(cluster, "events", namespace) if item["regarding"]["kind"] == "InferenceService"} >= {
            "Planned"
        }
