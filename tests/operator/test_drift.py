"""Others change, take away or occupy what the operator made, and the cluster changes under it: all comes back as it was, or stays."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_operator import apply as apply_module
from gantline_operator.client import Client, Resource

from tests.operator.harness import (
    FACTS,
    SETTINGS,
    TINY,
    Operator,
    apply,
    children,
    fates,
    get,
    gpu_nodes,
    inspected,
    install_crd,
    items,
    patch,
    remove_gpu_nodes,
    server_pods,
    service,
    serving,
    status,
    versions,
    wait,
    wait_reason,
)
from tests.operator.killing import in_the_full_matrix
from tests.operator.oracle import assert_at_rest, assert_gone, faults_of


@pytest.fixture(scope="module")
def world(api_cluster: ApiCluster) -> ApiCluster:
    install_crd(api_cluster)
    fates(api_cluster, inspected(tiny=TINY, kept=TINY, gpu=FACTS))
    return api_cluster


@pytest.fixture
def cluster(world: ApiCluster, namespace: str) -> Iterator[ApiCluster]:
    if not any(node["metadata"]["name"] == "cpu-0" for node in world.client.get("/api/v1/nodes").get("items") or []):
        world.simulate("cpu", 1)
    yield world
    remove_gpu_nodes(world, namespace)


EDITS = {
    "serviceaccount/tiny-runtime": {"automountServiceAccountToken": True},
    "service/tiny": {"spec": {"selector": {"gantline.io/service": "other"}}},
    "deployment/tiny": {"spec": {"replicas": 4, "progressDeadlineSeconds": 1, "template": {"spec": {"hostNetwork": True}}}},
    "poddisruptionbudget/tiny": {"spec": {"maxUnavailable": 0}},
}


def _all_names(cluster: ApiCluster, namespace: str) -> list[str]:
    """As kubectl takes them; of every kind that a service on a CPU has."""
    revision = status(cluster, "tiny", namespace)["revision"]
    return [*EDITS, f"controllerrevision/tiny-{revision}"]


def _edit(cluster: ApiCluster, namespace: str, name: str, change: Any, kind: str = "merge") -> None:
    cluster.kubectl("patch", name, "-n", namespace, f"--type={kind}", "-p", json.dumps(change))


def test_a_child_that_is_edited_deleted_orphaned_or_stripped_of_its_labels_comes_back_as_it_was(
    cluster: ApiCluster, namespace: str
) -> None:
    with serving(cluster, namespace):
        apply(cluster, service("tiny", namespace, replicas=2))
        assert_at_rest(cluster, namespace)
        names, template = _all_names(cluster, namespace), get(cluster, "deployments", "tiny", namespace)["spec"]["template"]
        for name, change in EDITS.items():
            _edit(cluster, namespace, name, change)
        assert_at_rest(cluster, namespace, quiet_s=0.5)
        cluster.kubectl("delete", "-n", namespace, *names)
        wait(lambda: not faults_of(cluster, namespace), what=lambda: faults_of(cluster, namespace))
        orphan = [{"op": "remove", "path": "/metadata/ownerReferences"}]
        for name in names:
            _edit(cluster, namespace, name, orphan, "json")
        assert_at_rest(cluster, namespace, quiet_s=0.5)
        cluster.kubectl("label", "-n", namespace, *names, "app.kubernetes.io/managed-by-", "gantline.io/service-")
        job = items(cluster, "jobs", namespace)[0]["metadata"]["name"]
        cluster.kubectl("delete", "job", job, "-n", namespace)
        assert_at_rest(cluster, namespace)
        assert not items(cluster, "jobs", namespace), "what a Job found out stands in the status: it is not done again"
        assert get(cluster, "deployments", "tiny", namespace)["spec"]["template"] == template


def test_watches_of_many_namespaces_leave_connections_for_requests(cluster: ApiCluster, namespace: str) -> None:
    """A namespaced install for nine namespaces watches some eighty things at once."""
    others = tuple(f"{namespace}-{i}" for i in range(8))
    with Operator(cluster, replace(SETTINGS, watch_namespaces=(namespace, *others))):
        apply(cluster, service("kept", namespace))
        wait_reason(cluster, "kept", namespace, "Ready")


def test_a_service_that_is_made_anew_adopts_what_it_left_behind_and_restarts_nothing(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the service is deleted while a reconcile is about to apply its Deployment, which must not tie it to what goes."""
    send, due, waiting = Client.apply, threading.Event(), threading.Event()

    async def send_late(self: Client, resource: Resource, body: Any, **options: Any) -> Any:
        if resource.kind == "Deployment" and due.is_set():
            due.clear()
            waiting.set()
            while (await self.get(resource, namespace, "kept"))["metadata"].get("ownerReferences"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return await send(self, resource, body, **options)

    monkeypatch.setattr(Client, "apply", send_late)
    with serving(cluster, namespace):
        apply(cluster, service("kept", namespace, replicas=2))
        wait_reason(cluster, "kept", namespace, "Ready")
        pods = {pod["metadata"]["uid"] for pod in server_pods(cluster, "kept", namespace)}
        for late in (True, False):
            if late:
                due.set()
                cluster.kubectl("annotate", "gisvc/kept", "-n", namespace, "example.com/looked-at=true")
                assert waiting.wait(60)
            cluster.kubectl("delete", "gisvc/kept", "-n", namespace, "--cascade=orphan")
            apply(cluster, service("kept", namespace, replicas=2))
            wait_reason(cluster, "kept", namespace, "Ready")
            assert_at_rest(cluster, namespace)
            assert {pod["metadata"]["uid"] for pod in server_pods(cluster, "kept", namespace)} == pods
        cluster.kubectl("delete", "gisvc/kept", "-n", namespace)
        assert_gone(cluster, namespace)


def test_names_that_strangers_took_are_told_and_theirs_stay(cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind of child, before the service came; one has a controller of its own and labels like ours."""
    monkeypatch.setattr(apply_module.Problem.__init__, "__defaults__", (0.5,))
    labels = {"app.kubernetes.io/managed-by": "gantline-operator", "gantline.io/service": "tiny"}
    owner = {"apiVersion": "v1", "kind": "Node", "name": "cpu-0", "controller": True}
    owner["uid"] = cluster.client.get("/api/v1/nodes/cpu-0")["metadata"]["uid"]
    root = f"/api/v1/namespaces/{namespace}"
    strangers = {
        f"{root}/serviceaccounts": {"metadata": {"name": "tiny-runtime", "labels": labels, "ownerReferences": [owner]}},
        f"{root}/services": {"metadata": {"name": "tiny"}, "spec": {"ports": [{"port": 99}], "clusterIP": "None"}},
    }
    made = {f"{path}/{item['metadata']['name']}": cluster.client.post(path, item) for path, item in strangers.items()}
    with serving(cluster, namespace):
        apply(cluster, service("tiny", namespace))
        for path, item in made.items():
            kind = "ServiceAccount tiny-runtime" if "serviceaccounts" in path else "Service tiny"
            found = wait(lambda kind=kind: _says(cluster, namespace, f"{kind} exists and is not ours"))
            assert found["status"] == "False"
            assert cluster.client.get(path)["metadata"]["resourceVersion"] == item["metadata"]["resourceVersion"]
            cluster.client.call("DELETE", path)
        wait_reason(cluster, "tiny", namespace, "Ready")
        assert_at_rest(cluster, namespace)


def _says(cluster: ApiCluster, namespace: str, words: str) -> Any:
    conditions = status(cluster, "tiny", namespace).get("conditions") or []
    return next((item for item in conditions if item["type"] == "Ready" and words in item["message"]), None)


def test_a_plan_stands_while_nodes_are_cordoned_and_lose_their_labels_and_moves_when_pods_cannot_run_any_more(
    cluster: ApiCluster, namespace: str
) -> None:
    place = gpu_nodes(cluster, namespace, "l4", 2)
    with serving(cluster, namespace):
        apply(cluster, service("gpu", namespace, **place))
        assert_at_rest(cluster, namespace)
        [pod] = server_pods(cluster, "gpu", namespace)
        revision, home = status(cluster, "gpu", namespace)["revision"], pod["spec"]["nodeName"]
        before = versions(cluster, namespace)
        cluster.kubectl("cordon", home)
        labels = [f"{key}-" for key in cluster.client.get(f"/api/v1/nodes/{home}")["metadata"]["labels"] if key.startswith("nvidia.com/")]
        cluster.kubectl("label", "node", home, *labels)
        gpu_nodes(cluster, namespace, "h100")
    with serving(cluster, namespace) as operator:  # which remembers nothing, and sees the cluster as it is
        wait(lambda: operator.reconciled)
        assert versions(cluster, namespace) == before
        cluster.kubectl("delete", "pod", pod["metadata"]["name"], "-n", namespace, "--wait=false")
        wait(lambda: [item["spec"].get("nodeName") not in (None, home) for item in server_pods(cluster, "gpu", namespace)] == [True])
        assert_at_rest(cluster, namespace)
        assert status(cluster, "gpu", namespace)["revision"] == revision, "the other node of its sort takes the pod"
        others = [node["metadata"]["name"] for node in cluster.client.get(f"/api/v1/nodes?labelSelector=for%3D{namespace}")["items"]]
        cluster.remove_nodes(*(name for name in others if name.startswith("l4")))
        cluster.kubectl("delete", "pods", "-n", namespace, "-l", "gantline.io/role=server", "--force", "--grace-period=0")
        wait(lambda: status(cluster, "gpu", namespace)["revision"] != revision, what=lambda: status(cluster, "gpu", namespace))
        assert_at_rest(cluster, namespace)
        assert status(cluster, "gpu", namespace)["plan"]["product"] == "NVIDIA-H100-80GB-HBM3"


@in_the_full_matrix
def test_a_namespace_that_ends_takes_its_services_with_it_and_troubles_no_other(cluster: ApiCluster, namespace: str) -> None:
    ending = f"{namespace}-ending"
    cluster.client.post("/api/v1/namespaces", {"metadata": {"name": ending}})
    with Operator(cluster, replace(SETTINGS, watch_namespaces=(namespace, ending))) as operator:
        apply(cluster, service("tiny", ending), service("kept", ending), service("tiny", namespace))
        assert_at_rest(cluster, ending, namespace)
        cluster.client.call("DELETE", f"/api/v1/namespaces/{ending}")
        wait(lambda: not children(cluster, ending) and not items(cluster, "inferenceservices", ending), timeout_s=120)
        patch(cluster, "tiny", namespace, {"replicas": 2})
        wait_reason(cluster, "tiny", namespace, "Ready")
        assert_at_rest(cluster, namespace)
        assert not operator.dead.is_set()
