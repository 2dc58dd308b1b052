"""The API server's own judgement of what is rendered: strict fields, Pod Security, an apply that changes nothing the second time."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.client import ApiError

from tests.operator.applying import apply
from tests.operator.render_cases import CASES, CPU_PLAN, CPU_STAGE, GPU_PLAN, Case, parent_of, service

Object = dict[str, Any]

EXTRAS = {
    "/apis/scheduling.k8s.io/v1/priorityclasses": {"metadata": {"name": "high"}, "value": 1000},
    "/apis/node.k8s.io/v1/runtimeclasses": {"metadata": {"name": "nvidia"}, "handler": "nvidia"},
}


@pytest.fixture
def restricted(api_cluster: ApiCluster, namespace: str) -> str:
    """A namespace that admits only pods of the restricted standard, in a cluster that has what our pods refer to."""
    label = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    api_cluster.client.call("PATCH", f"/api/v1/namespaces/{namespace}", label, content_type="application/merge-patch+json")
    for path, body in EXTRAS.items():
        try:
            api_cluster.client.post(path, body)
        except ApiError as error:
            assert error.status == 409, error
    return namespace


def pods_of(objects: Iterable[Object]) -> list[Object]:
    """The pods that Jobs and Deployments would make: Pod Security judges pods, and only warns about templates."""
    templates = [(item["metadata"]["name"], item["spec"]["template"]) for item in objects if item["kind"] in ("Job", "Deployment")]
    return [{"metadata": {**template["metadata"], "name": name}, "spec": template["spec"]} for name, template in templates]


@pytest.mark.parametrize("name", CASES)
def test_the_api_server_accepts_every_object_and_admits_every_pod(api_cluster: ApiCluster, restricted: str, name: str) -> None:
    objects = CASES[name].objects()
    for item in objects:
        live = apply(api_cluster.client, item, namespace=restricted, dry_run=True)
        assert live["metadata"]["labels"] == item["metadata"]["labels"]
    apply(api_cluster.client, next(item for item in objects if item["kind"] == "ServiceAccount"), namespace=restricted)
    for pod in pods_of(objects):
        api_cluster.client.post(f"/api/v1/namespaces/{restricted}/pods?dryRun=All&fieldValidation=Strict", pod)


def test_the_namespace_does_judge(api_cluster: ApiCluster, restricted: str) -> None:
    objects = CASES["quickstart"].objects()
    apply(api_cluster.client, next(item for item in objects if item["kind"] == "ServiceAccount"), namespace=restricted)
    pod = pods_of(objects)[0]
    del pod["spec"]["containers"][0]["securityContext"]["capabilities"]
    with pytest.raises(ApiError, match="restricted"):
        api_cluster.client.post(f"/api/v1/namespaces/{restricted}/pods?dryRun=All", pod)


def content_version(item: Object) -> str:
    """What changes with an object's own content: its generation where controllers write its status, else its resourceVersion."""
    return str(item["metadata"].get("generation") or item["metadata"]["resourceVersion"])


@pytest.mark.parametrize("name", ["cpu-from-image", "gpu-from-claim", "every-field"])
def test_an_apply_that_is_repeated_changes_nothing(api_cluster: ApiCluster, restricted: str, name: str) -> None:
    objects = [item for item in CASES[name].objects() if item["kind"] not in ("Job", "PersistentVolumeClaim")]
    first = [content_version(apply(api_cluster.client, item, namespace=restricted)) for item in objects]
    again = [content_version(apply(api_cluster.client, item, namespace=restricted)) for item in objects]
    assert first == again and len(first) == (8 if name == "every-field" else 4)  # which has an Ingress and three NetworkPolicies


def test_a_strategy_can_be_changed_both_ways_by_applying(api_cluster: ApiCluster, restricted: str) -> None:
    spec = {"model": {"uri": "pvc://models/x"}, "accelerator": {"resource": "nvidia.com/gpu"}}
    strategies = []
    for replicas in (2, 1, 2):
        parent = parent_of(service({**spec, "replicas": replicas}))
        case = Case(parent, GPU_PLAN, CPU_STAGE, fetched=False, quantized=False, makes_claim=False)
        live = apply(api_cluster.client, next(item for item in case.objects() if item["kind"] == "Deployment"), namespace=restricted)
        strategies.append(live["spec"]["strategy"]["type"])
    assert strategies == ["RollingUpdate", "Recreate", "RollingUpdate"]


def test_replicas_that_share_a_volume_for_one_node_land_on_one_node(simulated_nodes: ApiCluster, restricted: str) -> None:
    simulated_nodes.simulate("cpu", 3)
    parent = parent_of(service({"model": {"uri": "file:///m"}, "accelerator": {"resource": "cpu"}, "replicas": 4}))
    objects = Case(parent, CPU_PLAN, CPU_STAGE, fetched=False, quantized=True, makes_claim=False).objects()
    for volume in next(item for item in objects if item["kind"] == "Deployment")["spec"]["template"]["spec"]["volumes"]:
        if volume.pop("persistentVolumeClaim", None):  # the simulated cluster provisions none; the affinity is what is looked at
            volume["emptyDir"] = {}
    for item in objects:
        if item["kind"] in ("ServiceAccount", "Deployment"):
            apply(simulated_nodes.client, item, namespace=restricted)
    assert len(set(nodes_of_pods(simulated_nodes, restricted, 4))) == 1


def nodes_of_pods(cluster: ApiCluster, namespace: str, count: int) -> list[str]:
    """The nodes of all pods, once `count` have one."""
    deadline, nodes = time.monotonic() + 60, []
    while time.monotonic() < deadline:
        pods = cluster.client.get(f"/api/v1/namespaces/{namespace}/pods")["items"]
        nodes = [pod["spec"]["nodeName"] for pod in pods if pod["spec"].get("nodeName")]
        if len(nodes) == count:
            return nodes
        time.sleep(0.1)
    raise AssertionError(f"{len(nodes)} of {count} pods have a node")
