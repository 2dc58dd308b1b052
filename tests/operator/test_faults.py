"""What happens to operators in real clusters. Each fault ends in one oracle: live == desired, nothing extra, nothing moves any more."""

from __future__ import annotations

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
from gantline_operator.conditions import Reason

from tests.operator.definition import wait_until_established
from tests.operator.harness import (
    FACTS,
    SETTINGS,
    TINY,
    Operator,
    answer,
    apply,
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
    reason,
    remove_gpu_nodes,
    service,
    serving,
    status,
    versions,
    volume,
    wait,
    wait_events,
    wait_reason,
)
from tests.operator.oracle import assert_at_rest
from tests.operator.test_cache import claim

OUTAGES_S = (5, 90) if os.environ.get("GANTLINE_FULL_MATRIX") == "1" else (5,)


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


def assert_whole(cluster: ApiCluster, namespace: str, name: str = "tiny") -> None:
    wait_reason(cluster, name, namespace, "Ready")
    assert_at_rest(cluster, namespace)


def test_a_real_process_that_is_killed_is_continued_by_the_next(cluster: ApiCluster, namespace: str) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GANTLINE_")},
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


def test_a_definition_that_is_late_tightened_or_gone_and_outages_of_the_api_server_are_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster of its own, since others' watches would be cut too; without controllers, so nothing but the operator acts."""

    def seen(name: str) -> bool:
        parent = get(cluster, "inferenceservices", name, "default")
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
            for number, outage_s in enumerate(OUTAGES_S, 1):
                cluster.stop_apiserver()
                assert not operator.dead.wait(outage_s)
                cluster.start_apiserver()
                apply(cluster, service(f"late{number}", "default"))
                patch(cluster, "tiny", "default", {"replicas": 1 + number})
                wait(lambda number=number: seen("tiny") and seen(f"late{number}"))
                assert len(items(cluster, "jobs", "default")) == 1 + number
            cluster.kubectl("delete", "job", "--all")
            wait(lambda: len(items(cluster, "jobs", "default")) == 1 + len(OUTAGES_S))
            assert not operator.dead.is_set()
            tighten(cluster)
            patch(cluster, "tiny", "default", {"replicas": 7})
            wait(lambda: seen("tiny"))
            assert "stages" not in status(cluster, "tiny", "default")
        doomed = Operator(cluster).__enter__()
        wait(lambda: doomed.writes)
        cluster.kubectl("delete", "crd", "inferenceservices.gantline.io")
        assert doomed.dead.wait(60), "it ends, to be started anew by the kubelet and wait for its definition"
        install_crd(cluster)
        with Operator(cluster):
            apply(cluster, service("again", "default"))
            wait(lambda: seen("again"))


def tighten(cluster: ApiCluster) -> None:
    """The definition of another release: it does not know a field of the status that this operator writes, and forbids what is stored."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/inferenceservices.gantline.io"
    definition = cluster.client.get(path)
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    del schema["status"]["properties"]["stages"]
    schema["spec"]["properties"]["model"]["properties"]["uri"]["pattern"] = "^hf://"
    cluster.client.call("PUT", path, definition)
    wait_until_established(cluster, "inferenceservices.gantline.io")


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


def test_a_quantize_job_killed_half_way_is_started_anew_while_the_old_revision_serves(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for passing in (Reason.POD_EVICTED, Reason.POD_KILLED):
        monkeypatch.setitem(stages._PASSES, passing, (0.5, 1.0))  # type: ignore[index]
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


def test_a_copy_that_the_plan_needs_no_more_is_not_made_to_its_end(cluster: ApiCluster, namespace: str) -> None:
    """The Job holds a GPU, and days may be left to it."""
    small = gpu_nodes(cluster, namespace, "l4", name="s")["accelerator"]
    gpu_nodes(cluster, namespace, "h100", name="l")
    large = {**FACTS, "weightBytes": 22_000_000_000}
    fates(cluster, [*inspected(spared=large), ("quantize", "spared", "complete", copied(), {"after": "600s"})])
    claim(cluster, namespace)
    wish: dict[str, Any] = {"quantization": {"method": "awq", "policy": "IfNeeded"}, "engine": {"tensorParallel": 1, "sessionLen": 4096}}
    wish["cache"] = {"claimName": "models", "accessMode": "ReadWriteMany"}
    made = lambda: [item for item in items(cluster, "jobs", namespace) if "-quantize-" in item["metadata"]["name"]]
    with serving(cluster, namespace):
        apply(cluster, service("spared", namespace, accelerator={**small, "products": ["NVIDIA-L4"]}, **wish))
        wait_reason(cluster, "spared", namespace, "Quantizing")
        assert len(wait(made)) == 1
        patch(cluster, "spared", namespace, {"accelerator": {"products": ["NVIDIA-H100-80GB-HBM3"]}})
        wait_reason(cluster, "spared", namespace, "Ready")
        wait(lambda: not made(), what=made)
        assert status(cluster, "spared", namespace)["plan"]["precision"] == "bfloat16"


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
    nothing = answer(artefact={"kind": "evict", "evicted": [], "found": {}, "halves": {}})
    jobs_end = [("fetch", "packed", "failed", full, {"exit_code": 74}), ("evict", "packed", "complete", nothing, {})]
    fates(cluster, [*inspected(packed={**TINY, "revision": "abc123"}), *jobs_end])
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


def test_a_job_whose_pods_are_refused_says_so_instead_of_running_for_ever(cluster: ApiCluster, namespace: str) -> None:
    """The Job itself is taken, and its status says nothing of it."""
    path = f"/api/v1/namespaces/{namespace}/resourcequotas"
    cluster.client.post(path, {"metadata": {"name": "tight"}, "spec": {"hard": {"pods": "0"}}})
    wait(lambda: cluster.client.get(f"{path}/tight").get("status", {}).get("hard"))
    with serving(cluster, namespace):
        apply(cluster, service("tiny", namespace))
        found = wait_reason(cluster, "tiny", namespace, "Forbidden", "ModelReady")
        assert "Pods cannot be created: Error creating: pods is forbidden: exceeded quota: tight" in found["message"]
        assert reason(cluster, "tiny", namespace, "Degraded") == "Forbidden"
        wait_events(cluster, "tiny", namespace, "Forbidden")
        quiet = versions(cluster, namespace)
        assert wait(lambda: len(messages(cluster, namespace)) > 1) and reason(cluster, "tiny", namespace) == "Forbidden"
        moved = {name for name, version in versions(cluster, namespace).items() if quiet.get(name) != version}
        assert not any(name.startswith("inferenceservices/") for name in moved), "the status does not follow each try"
        cluster.client.call("DELETE", f"{path}/tight")
        wait_reason(cluster, "tiny", namespace, "Ready", timeout_s=120)


def messages(cluster: ApiCluster, namespace: str) -> set[str]:
    """What the controller of Jobs has said of pods that it could not create."""
    return {item["note"] for item in items(cluster, "events", namespace) if item["reason"] == "FailedCreate"}


def test_a_new_operator_restarts_no_pod(cluster: ApiCluster, namespace: str) -> None:
    with serving(cluster, namespace):
        apply(cluster, service("tiny", namespace))
        assert_whole(cluster, namespace)
    before = get(cluster, "deployments", "tiny", namespace)["spec"]["template"]
    untouched = versions(cluster, namespace)
    with serving(cluster, namespace, image_cpu="registry.example/gantline-runtime-cpu:next") as newer:
        wait(lambda: newer.reconciled)
        assert get(cluster, "deployments", "tiny", namespace)["spec"]["template"] == before
        assert versions(cluster, namespace) == untouched
        cluster.kubectl("annotate", "gisvc/tiny", "-n", namespace, "gantline.io/restartedAt=now")
        wait(lambda: json.dumps(get(cluster, "deployments", "tiny", namespace)["spec"]["template"]).count(":next"))
        wait_reason(cluster, "tiny", namespace, "Ready")


def without_services(role: dict[str, Any]) -> dict[str, Any]:
    rules = [{**rule, "resources": [name for name in rule["resources"] if name != "services"]} for rule in role["rules"]]
    return {**role, "rules": rules}


def test_the_operator_works_under_the_charts_own_rights_and_waits_for_one_that_is_missing(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Namespaced, without a look at nodes: the least that the chart can be installed with. Its Service is the fourth of five children."""
    monkeypatch.setattr(apply_module.Problem.__init__, "__defaults__", (0.5,))
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
    lacking = [without_services(item) if item["kind"] == "Role" else item for item in objects]
    apply(cluster, *lacking)
    account = "gantline"
    kubeconfig: Path = cluster.service_account_kubeconfig(namespace, account)
    with Operator(cluster, replace(SETTINGS, watch_namespaces=(namespace,)), kubeconfig=kubeconfig):
        apply(cluster, service("tiny", namespace))
        refused = wait_reason(cluster, "tiny", namespace, "Forbidden")
        assert "cannot" in refused["message"] and '"services"' in refused["message"]
        apply(cluster, *objects)
        assert_whole(cluster, namespace)
        assert {item["reason"] for item in items(cluster, "events", namespace) if item["regarding"]["kind"] == "InferenceService"} >= {
            "Planned"
        }
