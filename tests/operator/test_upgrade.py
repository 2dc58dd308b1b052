"""Objects as earlier releases stored them, under today's operator: nothing that serves is touched, whatever this release would render."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster

from tests.operator.harness import (
    SETTINGS,
    Operator,
    get,
    gpu_nodes,
    install_crd,
    items,
    patch,
    remove_gpu_nodes,
    status,
    volume,
    wait,
    wait_reason,
)
from tests.operator.oracle import assert_at_rest
from tests.operator.record_release import FOLDER, PLACE

Object = dict[str, Any]
GROUP = "/apis/gantline.io/v1alpha1"
MADE_ANEW = {"clusterIP", "clusterIPs", "volumeName", "controller-uid", "batch.kubernetes.io/controller-uid"}


@pytest.fixture
def cluster(api_cluster: ApiCluster) -> Iterator[ApiCluster]:
    install_crd(api_cluster)
    if not any(node["metadata"]["name"] == "cpu-0" for node in api_cluster.client.get("/api/v1/nodes").get("items") or []):
        api_cluster.simulate("cpu", 1)
    gpu_nodes(api_cluster, PLACE, "l4", 2)
    yield api_cluster
    remove_gpu_nodes(api_cluster, PLACE)


def _restore(cluster: ApiCluster, namespace: str, recorded: dict[str, list[Object]]) -> None:
    """As the earlier release's operator left it: by its field manager, owned by services that have new uids here."""
    owners = {}
    for claim in recorded["persistentvolumeclaims"]:
        volume(cluster, namespace, claim["metadata"]["name"])
    for item in recorded["inferenceservices"]:
        path = f"{GROUP}/namespaces/{namespace}/inferenceservices"
        made = cluster.client.post(path, {**item, "apiVersion": "gantline.io/v1alpha1", "kind": "InferenceService"})
        owners[item["metadata"]["name"]] = made["metadata"]["uid"]
        body = {"apiVersion": "gantline.io/v1alpha1", "kind": "InferenceService", "metadata": {"name": item["metadata"]["name"]}}
        cluster.client.apply(f"{path}/{item['metadata']['name']}/status", {**body, "status": _seen(item, made)}, "gantline-operator")
    for plural, found in recorded.items():
        for item in found if plural not in ("inferenceservices", "jobs") else ():  # finished Jobs have long expired
            root = f"/apis/{item['apiVersion']}" if "/" in item["apiVersion"] else f"/api/{item['apiVersion']}"
            path = f"{root}/namespaces/{namespace}/{plural}/{item['metadata']['name']}"
            cluster.client.apply(path, _owned(item, owners), "gantline-operator")


def _seen(item: Object, made: Object) -> Object:
    """The status, of the generation that the service has here."""
    generation = made["metadata"]["generation"]
    conditions = [{**condition, "observedGeneration": generation} for condition in item["status"]["conditions"]]
    return {**item["status"], "observedGeneration": generation, "conditions": conditions}


def _owned(item: Object, owners: dict[str, str]) -> Object:
    metadata = item["metadata"]
    references = [{**owner, "uid": owners[owner["name"]]} for owner in metadata["ownerReferences"]]
    kept = {key: value for key, value in metadata.items() if key not in ("annotations", "finalizers")}
    body = {key: value for key, value in item.items() if key != "status"}
    if isinstance(body.get("spec"), dict):
        body["spec"] = {key: value for key, value in body["spec"].items() if key not in MADE_ANEW}
    return {**body, "metadata": {**kept, "ownerReferences": references}}


def _serving(cluster: ApiCluster, namespace: str) -> dict[str, Any]:
    """Pods by uid, and templates, of all that serves."""
    pods = {pod["metadata"]["uid"]: pod["metadata"]["name"] for pod in items(cluster, "pods", namespace)}
    return pods | {item["metadata"]["name"]: item["spec"]["template"] for item in items(cluster, "deployments", namespace)}


@pytest.mark.parametrize("release", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_an_upgrade_restarts_no_pod_though_the_images_are_new(cluster: ApiCluster, namespace: str, release: Path) -> None:
    recorded = json.loads(release.read_text())
    _restore(cluster, namespace, recorded)
    wanted = {item["metadata"]["name"]: item["spec"]["replicas"] for item in recorded["deployments"]}
    ready = lambda: {item["metadata"]["name"]: item["status"].get("readyReplicas", 0) for item in items(cluster, "deployments", namespace)}
    wait(lambda: ready() == wanted, what=ready)
    before = _serving(cluster, namespace)
    settings = replace(
        SETTINGS, watch_namespaces=(namespace,), image_cuda="registry.example/next:2", image_cpu="registry.example/next-cpu:2"
    )
    with Operator(cluster, settings) as operator:
        wait(lambda: set(wanted) <= set(operator.reconciled))
        assert_at_rest(cluster, namespace, settings=settings)
        assert _serving(cluster, namespace) == before
        for item in recorded["inferenceservices"]:
            assert status(cluster, item["metadata"]["name"], namespace)["revision"] == item["status"]["revision"]
        assert not items(cluster, "jobs", namespace), "what a Job found out stands in the status: it is not done again"
        patch(cluster, "tiny", namespace, {"engine": {"maxBatchSize": 9}})
        wait(lambda: "next-cpu:2" in json.dumps(get(cluster, "deployments", "tiny", namespace)["spec"]["template"]))
        wait_reason(cluster, "tiny", namespace, "Ready")
        patch(cluster, "idle", namespace, {"replicas": 1})
        wait_reason(cluster, "idle", namespace, "Ready")
        template = json.dumps(get(cluster, "deployments", "idle", namespace)["spec"]["template"])
        assert "next" not in template, "also what sleeps wakes as it was"
