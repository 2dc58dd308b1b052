"""Whether the cache's claim ties a service's pods to one node is what the claim says that there is, whatever the spec asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_operator.reconcile import Reconcile
from gantline_operator.resources import Parent

from tests.operator.harness import (
    TINY,
    answer,
    apply,
    fates,
    get,
    inspected,
    install_crd,
    items,
    patch,
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
    """One of the user's own. Its volume could do both."""
    volume(cluster, namespace, "models")
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


def test_an_upgrade_from_a_release_that_asked_the_spec_restarts_no_pod(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(cluster, namespace, "ReadWriteMany")
    built = Reconcile._build_revision
    with monkeypatch.context() as earlier:
        earlier.setattr(Parent, "cache_on_one_node", property(lambda parent: parent.spec.cache.access_mode != "ReadWriteMany"))
        without = lambda data: {key: value for key, value in data.items() if key != "sharedByClaim"}
        earlier.setattr(Reconcile, "_build_revision", lambda self, mark, data: built(self, mark, without(data)))
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
