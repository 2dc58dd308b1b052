"""Many services: a restarted operator changes nothing, asks little and mends all, and churn ends as it should. Figures are
benchmarks/operator_scale.py's."""

from __future__ import annotations

import json
import time
from typing import Any

from gantline_devcluster.api_only import ApiCluster

from tests.operator.churn import Churn
from tests.operator.definition import every_kind
from tests.operator.harness import (
    TINY,
    answer,
    apply,
    fate,
    fates,
    inspected,
    install_crd,
    items,
    remove_gpu_nodes,
    service,
    serving,
    settled,
    versions,
    volume,
    wait,
    wait_reason,
)
from tests.operator.oracle import assert_at_rest

NAMES = [f"many{index}" for index in range(8)]


MANY = [f"many{index}" for index in range(8)]
SPECIAL = {
    "cached": {"model": {"uri": "hf://org/tiny"}},
    "hpa": {"scaling": {"controller": "HPA", "min": 1, "max": 2}},
    "door": {"ingress": {"host": "door.example"}},
    "two": {"replicas": 2},
}
"""With a claim, an autoscaler, an Ingress, a PodDisruptionBudget."""
NAMES = [*MANY, *SPECIAL]


def test_a_restarted_operator_asks_for_lists_alone_writes_nothing_and_mends_what_was_done_while_none_ran(
    api_cluster: ApiCluster, namespace: str
) -> None:
    _make_all(api_cluster, namespace)
    before = versions(api_cluster, namespace)
    with serving(api_cluster, namespace) as operator:
        wait(lambda: set(NAMES) <= set(operator.reconciled))
        named = {name: [item for item in operator.requests if f"/{name}" in item[1]] for name in NAMES}
        assert not any(named.values()), "nobody was asked for by name"
        # Services twice, twelve kinds of children and pods; those of them that are watched; nodes, pods, devices; what kinds there are.
        assert len(operator.requests) < 36, operator.requests
        time.sleep(3.0)
        assert sorted(operator.reconciled) == sorted(NAMES), "watches begin by telling of everything, which is no news"
        assert not operator.writes
        assert versions(api_cluster, namespace) == before
    meddled = _meddle(api_cluster, namespace)
    with serving(api_cluster, namespace) as operator:
        wait(lambda: set(NAMES) <= set(operator.reconciled))
        assert_at_rest(api_cluster, namespace)
        autoscalers = api_cluster.client.get(f"/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers")["items"]
        assert [(item["metadata"]["name"], item["spec"]["maxReplicas"]) for item in autoscalers] == [("hpa", 2)]
    left_alone = set(NAMES) - meddled
    assert left_alone
    assert _of(versions(api_cluster, namespace), left_alone) == _of(before, left_alone)


def _make_all(cluster: ApiCluster, namespace: str) -> None:
    """Twelve services, as an operator left them that is no more."""
    install_crd(cluster)
    if not cluster.client.get("/api/v1/nodes").get("items"):
        cluster.simulate("cpu", 1)
    fates(cluster, inspected(**{name: {**TINY, "revision": "abc123"} for name in NAMES}))
    fate(cluster, "fetch", "cached", "complete", answer(artefact={"kind": "fetch", "path": "/mnt/cache/x", "bytes": 11_000_000}))
    volume(cluster, namespace, "cached-cache")
    with serving(cluster, namespace):
        apply(cluster, *(service(name, namespace, **SPECIAL.get(name, {})) for name in NAMES))
        for name in NAMES:
            wait_reason(cluster, name, namespace, "Ready")
        wait(lambda: all("ttlSecondsAfterFinished" in job["spec"] for job in items(cluster, "jobs", namespace)))
        wait(lambda: settled(cluster, namespace, 1.0))


def _meddle(cluster: ApiCluster, namespace: str) -> set[str]:
    """With children of these."""

    def kubectl(*arguments: str) -> None:
        cluster.kubectl(*arguments, "-n", namespace)

    kubectl("scale", "deployment/many0", "--replicas=3")
    kubectl("patch", "service/many1", "--type=merge", "-p", json.dumps({"spec": {"selector": {"gantline.io/service": "other"}}}))
    kubectl("delete", "serviceaccount/many2-runtime", "ingress/door", "poddisruptionbudget/two")
    kubectl("label", "service/many3", "app.kubernetes.io/managed-by-", "gantline.io/service-")
    orphan = json.dumps([{"op": "remove", "path": "/metadata/ownerReferences"}])
    kubectl("patch", "deployment/many4", "--type=json", "-p", orphan)
    _stray_autoscaler(cluster, namespace, "many5")
    _take_over(cluster, namespace, "many6")
    kubectl("patch", "horizontalpodautoscaler/hpa", "--type=merge", "-p", json.dumps({"spec": {"maxReplicas": 9}}))
    return {*MANY[:7], "door", "two", "hpa"}


def _of(found: dict[str, str], names: set[str]) -> dict[str, str]:
    """resourceVersions of what bears one of the names."""
    return {key: version for key, version in found.items() if key.partition("/")[2].partition("-")[0] in names}


def _stray_autoscaler(cluster: ApiCluster, namespace: str, name: str) -> None:
    """One of ours that is wanted no more, and lost its labels."""
    parent = cluster.client.get(f"/apis/gantline.io/v1alpha1/namespaces/{namespace}/inferenceservices/{name}")
    owner = {"apiVersion": "gantline.io/v1alpha1", "kind": "InferenceService", "name": name, "uid": parent["metadata"]["uid"]}
    body: dict[str, Any] = {
        "metadata": {"name": name, "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}]},
        "spec": {
            "maxReplicas": 5,
            "scaleTargetRef": {"apiVersion": "gantline.io/v1alpha1", "kind": "InferenceService", "name": name},
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}}}],
        },
    }
    cluster.client.post(f"/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers", body)


def _take_over(cluster: ApiCluster, namespace: str, name: str) -> None:
    """Somebody applies the Deployment by force with a field of ours, and another value."""
    metadata = {"name": name, "namespace": namespace}
    body = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": {"progressDeadlineSeconds": 7}}
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "--field-manager=somebody", "-f", "-", input=json.dumps(body))


def test_churn_ends_with_what_the_specs_ask_for(api_cluster: ApiCluster, namespace: str) -> None:
    """Seconds of what `python -m tests.operator.churn` does for half an hour."""
    install_crd(api_cluster)
    if not api_cluster.client.get("/api/v1/nodes").get("items"):
        api_cluster.simulate("cpu", 1)
    try:
        with every_kind(api_cluster), Churn(api_cluster, namespace, services=3, seed=1) as churn:
            for _ in range(16):
                churn.step()
            churn.settle()
            assert len(churn.done) >= 5, churn.done
    finally:
        remove_gpu_nodes(api_cluster, namespace)
