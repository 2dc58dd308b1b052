"""Several replicas prefer different nodes and zones; an operator that learns to ask for that restarts no pod. On a real API server."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from gantline_devcluster import profiles
from gantline_devcluster.api_only import ApiCluster, add_nodes

from tests.operator.applying import apply as apply_rendered
from tests.operator.harness import (
    TINY,
    apply,
    fates,
    get,
    inspected,
    install_crd,
    remove_gpu_nodes,
    server_pods,
    service,
    serving,
    status,
    wait,
    wait_reason,
)
from tests.operator.render_cases import CPU_PLAN, CPU_STAGE, Case, parent_of
from tests.operator.render_cases import service as manifest_of
from tests.operator.test_resources_applied import nodes_of_pods

Object = dict[str, Any]


@pytest.fixture
def cluster(api_cluster: ApiCluster, namespace: str) -> Iterator[ApiCluster]:
    yield api_cluster
    remove_gpu_nodes(api_cluster, namespace)


def make_nodes(cluster: ApiCluster, namespace: str, zones: Sequence[str]) -> list[str]:
    """Nodes of the test's own, one in each of `zones` ("": in none). The first has eight times the room of the others."""
    nodes = profiles.load("cpu", len(zones))
    for node, zone in zip(nodes, zones, strict=True):
        node["metadata"]["name"] += namespace.removeprefix("test")
        node["metadata"]["labels"] |= {"for": namespace, "kubernetes.io/hostname": node["metadata"]["name"]}
        node["metadata"]["labels"].pop("topology.kubernetes.io/zone", None)
        if zone:
            node["metadata"]["labels"]["topology.kubernetes.io/zone"] = zone
    for part in ("capacity", "allocatable"):
        nodes[0]["status"][part] |= {"cpu": "256", "memory": "2048Gi"}
    add_nodes(cluster.client, nodes)
    return [node["metadata"]["name"] for node in nodes]


def deploy(cluster: ApiCluster, namespace: str, replicas: int) -> list[str]:
    """Nodes of the pods of a service with `replicas`, as the operator renders it."""
    accelerator = {"resource": "cpu", "nodeSelector": {"for": namespace}}
    parent = parent_of(manifest_of({"model": {"uri": "file:///m"}, "accelerator": accelerator, "replicas": replicas}))
    for item in Case(parent, CPU_PLAN, CPU_STAGE, fetched=False, quantized=False, makes_claim=False).objects():
        if item["kind"] in ("ServiceAccount", "Service", "Deployment"):
            apply_rendered(cluster.client, item, namespace=namespace)
    return nodes_of_pods(cluster, namespace, replicas)


def test_replicas_share_out_the_nodes_also_where_no_node_has_a_zone(cluster: ApiCluster, namespace: str) -> None:
    nodes = make_nodes(cluster, namespace, ["", "", ""])
    assert Counter(deploy(cluster, namespace, 6)) == dict.fromkeys(nodes, 2), "however much room the first one has"


def test_two_replicas_lie_in_two_zones_though_one_of_them_has_more_room(cluster: ApiCluster, namespace: str) -> None:
    *_, alone = make_nodes(cluster, namespace, ["a", "a", "a", "b"])
    assert alone in deploy(cluster, namespace, 2)


def test_a_single_node_takes_all_replicas(cluster: ApiCluster, namespace: str) -> None:
    (node,) = make_nodes(cluster, namespace, ["a"])
    assert Counter(deploy(cluster, namespace, 4)) == {node: 4}


def test_an_operator_that_learns_to_spread_leaves_pods_of_existing_revisions_alone(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendering = importlib.import_module("gantline_operator.resources.serving")
    install_crd(cluster)
    fates(cluster, inspected(old=TINY))
    make_nodes(cluster, namespace, [""])
    place = {"accelerator": {"resource": "cpu", "nodeSelector": {"for": namespace}}}
    with monkeypatch.context() as earlier, serving(cluster, namespace):
        earlier.setattr(rendering, "spread", lambda marks: [])
        earlier.setattr(rendering, "apart", lambda marks: {})
        apply(cluster, service("old", namespace, replicas=2, **place))
        wait_reason(cluster, "old", namespace, "Ready")
    template = get(cluster, "deployments", "old", namespace)["spec"]["template"]
    pods = {pod["metadata"]["uid"] for pod in server_pods(cluster, "old", namespace)}
    revision = status(cluster, "old", namespace)["revision"]
    assert "topologySpreadConstraints" not in template["spec"] and len(pods) == 2
    with serving(cluster, namespace):
        cluster.kubectl("scale", "gisvc/old", "--replicas=3", "-n", namespace)
        wait(lambda: status(cluster, "old", namespace)["readyReplicas"] == 3)
        assert get(cluster, "deployments", "old", namespace)["spec"]["template"] == template
        assert pods < {pod["metadata"]["uid"] for pod in server_pods(cluster, "old", namespace)}
        assert status(cluster, "old", namespace)["revision"] == revision
        cluster.kubectl("annotate", "gisvc/old", "-n", namespace, "gantline.io/restartedAt=now")
        wait(lambda: status(cluster, "old", namespace)["revision"] != revision)
        wait_reason(cluster, "old", namespace, "Ready")
        renewed = get(cluster, "deployments", "old", namespace)["spec"]["template"]["spec"]
        assert [item["topologyKey"] for item in renewed["topologySpreadConstraints"]] == ["kubernetes.io/hostname"]
