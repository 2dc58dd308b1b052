"""Whether the claim of a cache or a source ties a service's pods to one node, or to one pod, is what the claim says that there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_operator import preparation
from gantline_operator.claim_sharing import Sharing
from gantline_operator.reconcile import Reconcile
from gantline_operator.resources import Parent

from tests.operator.harness import (
    TINY,
    answer,
    apply,
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
    volume,
    wait,
    wait_reason,
)
from tests.operator.oracle import assert_at_rest

Object = dict[str, Any]


@pytest.fixture
def cluster(api_cluster: ApiCluster) -> Iterator[ApiCluster]:
    install_crd(api_cluster)
    fetched = answer(artefact={"kind": "fetch", "bytes": TINY["weightBytes"]})
    fates(api_cluster, [*inspected(chat={**TINY, "revision": "abc"}), ("fetch", "chat", "complete", fetched, {})])
    if not any(node["metadata"]["name"] == "cpu-0" for node in api_cluster.client.get("/api/v1/nodes").get("items") or []):
        api_cluster.simulate("cpu", 1)
    yield api_cluster


def claim(cluster: ApiCluster, namespace: str, *modes: str) -> None:
    """One of the user's own. Its volume could do all, unless it is for one pod: that goes with nothing else."""
    alone = {"modes": modes} if "ReadWriteOncePod" in modes else {}
    volume(cluster, namespace, "models", **alone)
    spec = {"accessModes": list(modes), "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": ""}
    metadata = {"name": "models", "namespace": namespace}
    apply(cluster, {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})


def chat(namespace: str, **cache: Any) -> Object:
    return service("chat", namespace, model={"uri": "hf://org/name"}, cache=cache)


def tied(cluster: ApiCluster, namespace: str) -> bool:
    """Whether pods of the service have to be on the node of those that mount its cache."""
    template = get(cluster, "deployments", "chat", namespace)["spec"]["template"]["spec"]
    return "podAffinity" in (template.get("affinity") or {})


@pytest.mark.parametrize(
    ("modes", "asked", "one_node"),
    [
        (["ReadWriteMany"], {}, False),
        (["ReadWriteOnce", "ReadWriteMany"], {}, False),
        (["ReadWriteOnce"], {"accessMode": "ReadWriteMany"}, True),
        (["ReadWriteOnce"], {}, True),
    ],
)
def test_a_claim_of_the_users_says_itself_whether_it_is_shared(
    cluster: ApiCluster, namespace: str, modes: list[str], asked: dict[str, str], one_node: bool
) -> None:
    claim(cluster, namespace, *modes)
    with serving(cluster, namespace):
        apply(cluster, chat(namespace, claimName="models", **asked))
        wait_reason(cluster, "chat", namespace, "Ready")
        assert tied(cluster, namespace) == one_node
        (job,) = (item for item in items(cluster, "jobs", namespace) if "-fetch-" in item["metadata"]["name"])
        assert ("podAffinity" in (job["spec"]["template"]["spec"].get("affinity") or {})) == one_node
        assert_at_rest(cluster, namespace)


def test_another_access_mode_in_the_spec_changes_no_claim_that_is_there(cluster: ApiCluster, namespace: str) -> None:
    volume(cluster, namespace, "chat-cache")
    with serving(cluster, namespace):
        apply(cluster, chat(namespace))
        wait_reason(cluster, "chat", namespace, "Ready")
        before = status(cluster, "chat", namespace)["revision"]
        patch(cluster, "chat", namespace, {"cache": {"accessMode": "ReadWriteMany"}})
        wait(lambda: status(cluster, "chat", namespace)["observedGeneration"] == 2)
        assert_at_rest(cluster, namespace)
        assert status(cluster, "chat", namespace)["revision"] == before and tied(cluster, namespace)


def leave_out_who_was_asked(earlier: pytest.MonkeyPatch) -> None:
    """Of revisions' data: those of releases that did not ask claims lack it."""
    built = Reconcile._build_revision
    without = lambda data: {key: value for key, value in data.items() if key != "sharedByClaim"}
    earlier.setattr(Reconcile, "_build_revision", lambda self, mark, data: built(self, mark, without(data)))


def test_an_upgrade_from_a_release_that_asked_the_spec_restarts_no_pod(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(cluster, namespace, "ReadWriteMany")
    with monkeypatch.context() as earlier:
        asked = lambda parent: Sharing.ANY if parent.spec.cache.access_mode == "ReadWriteMany" else Sharing.ONE_NODE
        earlier.setattr(Parent, "sharing_of_cache", property(asked))
        leave_out_who_was_asked(earlier)
        with serving(cluster, namespace):
            apply(cluster, chat(namespace, claimName="models"))
            wait_reason(cluster, "chat", namespace, "Ready")
            assert tied(cluster, namespace)
    before = [pod["metadata"]["uid"] for pod in server_pods(cluster, "chat", namespace)]
    with serving(cluster, namespace) as operator:
        wait(lambda: operator.reconciled)
        patch(cluster, "chat", namespace, {"replicas": 2})
        wait(lambda: status(cluster, "chat", namespace)["observedGeneration"] == 2)
        wait_reason(cluster, "chat", namespace, "Ready")
        assert tied(cluster, namespace)
        assert set(before) <= {pod["metadata"]["uid"] for pod in server_pods(cluster, "chat", namespace)}
        patch(cluster, "chat", namespace, {"engine": {"maxBatchSize": 3}})
        wait(lambda: not tied(cluster, namespace))
        wait_reason(cluster, "chat", namespace, "Ready")
        assert_at_rest(cluster, namespace)


def read_in_place(namespace: str, **spec: Any) -> Object:
    return service("chat", namespace, model={"uri": "pvc://models/llama"}, **spec)


def nodes(cluster: ApiCluster, namespace: str) -> list[str]:
    """Of the pods that have one."""
    return [pod["spec"]["nodeName"] for pod in server_pods(cluster, "chat", namespace) if pod["spec"].get("nodeName")]


@pytest.mark.parametrize(
    ("modes", "one_node"),
    [
        (["ReadOnlyMany"], False),
        (["ReadWriteMany"], False),
        (["ReadWriteOnce", "ReadOnlyMany"], False),
        (["ReadWriteOnce"], True),
    ],
)
def test_replicas_that_read_a_source_in_place_are_where_its_claim_can_be(
    cluster: ApiCluster, namespace: str, modes: list[str], one_node: bool
) -> None:
    """On three nodes that are otherwise alike. A second service, and one more revision, find the claim where the first one has it."""
    place = gpu_nodes(cluster, namespace, "h100", 3)
    fates(cluster, inspected(chat=TINY, other=TINY))
    claim(cluster, namespace, *modes)
    try:
        with serving(cluster, namespace):
            apply(cluster, read_in_place(namespace, replicas=3, **place))
            found = wait_reason(cluster, "chat", namespace, "Ready")
            assert len(set(nodes(cluster, namespace))) == (1 if one_node else 3)
            scheduled = wait_reason(cluster, "chat", namespace, "Scheduled", "Scheduled")
            assert ("the server's all on the node that has claim models" in scheduled["message"]) == one_node, found
            strategy = get(cluster, "deployments", "chat", namespace)["spec"]["strategy"]["type"]
            assert strategy == ("Recreate" if one_node else "RollingUpdate")
            apply(cluster, {**read_in_place(namespace, **place), "metadata": {"name": "other", "namespace": namespace}})
            wait_reason(cluster, "other", namespace, "Ready")
            (job,) = (item for item in items(cluster, "jobs", namespace) if item["metadata"]["name"].startswith("other-"))
            tolerated = [item["key"] for item in job["spec"]["template"]["spec"].get("tolerations") or []]
            assert ("nvidia.com/gpu" in tolerated) == one_node, "the node that has the claim may be for pods with GPUs"
            (beside,) = server_pods(cluster, "other", namespace)
            assert not one_node or beside["spec"]["nodeName"] == nodes(cluster, namespace)[0]
            patch(cluster, "chat", namespace, {"engine": {"maxBatchSize": 3}})
            wait(lambda: status(cluster, "chat", namespace)["observedGeneration"] == 2)
            wait_reason(cluster, "chat", namespace, "Ready")
            assert not one_node or set(nodes(cluster, namespace)) == {beside["spec"]["nodeName"]}
            assert_at_rest(cluster, namespace)
    finally:
        remove_gpu_nodes(cluster, namespace)


def test_a_source_that_one_node_can_mount_limits_replicas_to_what_that_node_holds(cluster: ApiCluster, namespace: str) -> None:
    place = gpu_nodes(cluster, namespace, "l4", 2)
    held = int(cluster.client.get("/api/v1/nodes?labelSelector=for%3D" + namespace)["items"][0]["status"]["allocatable"]["nvidia.com/gpu"])
    claim(cluster, namespace, "ReadWriteOnce")
    try:
        with serving(cluster, namespace):
            apply(cluster, read_in_place(namespace, replicas=held + 1, **place))
            found = wait_reason(cluster, "chat", namespace, "SourceNotShareable")
            assert "Claim models ties all replicas to one node" in found["message"] and "ReadOnlyMany or ReadWriteMany" in found["message"]
            wait_reason(cluster, "chat", namespace, "Available", "Servable")
            patch(cluster, "chat", namespace, {"replicas": held})
            wait_reason(cluster, "chat", namespace, "Ready")
    finally:
        remove_gpu_nodes(cluster, namespace)


def test_a_source_for_one_pod_serves_one_replica_and_says_so_of_more(cluster: ApiCluster, namespace: str) -> None:
    claim(cluster, namespace, "ReadWriteOncePod")
    with serving(cluster, namespace):
        apply(cluster, read_in_place(namespace, rollout={"strategy": "Surge"}, scaling={"max": 2}))
        wait_reason(cluster, "chat", namespace, "Ready")
        found = wait_reason(cluster, "chat", namespace, "SourceNotShareable", "ScalingReady")
        assert "scaling.max is 2" in found["message"]
        # Nothing may start beside it: not the next revision, whatever the spec asks for, nor a second replica.
        assert get(cluster, "deployments", "chat", namespace)["spec"]["strategy"]["type"] == "Recreate"
        patch(cluster, "chat", namespace, {"engine": {"maxBatchSize": 3}, "scaling": None})
        wait(lambda: status(cluster, "chat", namespace)["observedGeneration"] == 2)
        wait_reason(cluster, "chat", namespace, "Ready")
        assert_at_rest(cluster, namespace)
        patch(cluster, "chat", namespace, {"replicas": 2})
        found = wait_reason(cluster, "chat", namespace, "SourceNotShareable")
        assert "Only one pod at a time can mount claim models (ReadWriteOncePod)" in found["message"]
        assert wait_reason(cluster, "chat", namespace, "Available", "Servable")["status"] == "True"
        patch(cluster, "chat", namespace, {"replicas": 1})
        wait_reason(cluster, "chat", namespace, "Ready")
        # A look at files that were changed in place cannot be had beside it.
        cluster.kubectl("annotate", "gisvc/chat", "-n", namespace, "gantline.io/restartedAt=now")
        found = wait_reason(cluster, "chat", namespace, "WaitingForVolume", "ModelReady")
        assert "set replicas to 0" in found["message"]
        patch(cluster, "chat", namespace, {"replicas": 0})
        wait_reason(cluster, "chat", namespace, "Inspected", "ModelReady")
        patch(cluster, "chat", namespace, {"replicas": 1})
        wait_reason(cluster, "chat", namespace, "Ready")


def test_an_upgrade_from_a_release_that_tied_no_source_restarts_no_pod(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(cluster, namespace, "ReadWriteOnce")
    with monkeypatch.context() as earlier:
        earlier.setattr(preparation, "sharing_of", lambda claim, read_only: Sharing.ANY)
        leave_out_who_was_asked(earlier)
        with serving(cluster, namespace):
            apply(cluster, read_in_place(namespace))
            wait_reason(cluster, "chat", namespace, "Ready")
    before = [pod["metadata"]["uid"] for pod in server_pods(cluster, "chat", namespace)]
    with serving(cluster, namespace) as operator:
        wait(lambda: operator.reconciled)
        patch(cluster, "chat", namespace, {"replicas": 2})
        wait(lambda: status(cluster, "chat", namespace)["observedGeneration"] == 2)
        wait_reason(cluster, "chat", namespace, "Ready")
        assert not tied(cluster, namespace)
        assert set(before) <= {pod["metadata"]["uid"] for pod in server_pods(cluster, "chat", namespace)}
        patch(cluster, "chat", namespace, {"engine": {"maxBatchSize": 3}})
        wait(lambda: tied(cluster, namespace))
        wait_reason(cluster, "chat", namespace, "Ready")


def test_a_sources_claim_that_is_gone_is_told_and_waited_for(cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_MISSING_POLL_S", 0.5)
    claim(cluster, namespace, "ReadWriteMany")
    with serving(cluster, namespace):
        apply(cluster, read_in_place(namespace))
        wait_reason(cluster, "chat", namespace, "Ready")
        patch(cluster, "chat", namespace, {"replicas": 0})
        wait(lambda: not server_pods(cluster, "chat", namespace))
        cluster.kubectl("delete", "pvc/models", "-n", namespace, "--wait=false")  # the pod of the inspection has it, though it has ended
        patch(cluster, "chat", namespace, {"replicas": 1})
        found = wait_reason(cluster, "chat", namespace, "ModelNotFound")
        assert "PersistentVolumeClaim models does not exist" in found["message"]
        cluster.kubectl("delete", f"pv/{namespace}-models")
        claim(cluster, namespace, "ReadWriteMany")
        wait_reason(cluster, "chat", namespace, "Ready")
