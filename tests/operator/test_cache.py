"""Services that share a cache volume, on a real API server: one copy, one Job, and room where nothing is in use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster

from tests.operator.harness import (
    TINY,
    Operator,
    answer,
    apply,
    copied,
    event_reasons,
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
)  # fmt: skip

Object = dict[str, Any]
SIZE = TINY["weightBytes"]
FETCHED = answer(artefact={"kind": "fetch", "bytes": SIZE})


@pytest.fixture(scope="module")
def cluster(api_cluster: ApiCluster) -> ApiCluster:
    install_crd(api_cluster)
    if not api_cluster.client.get("/api/v1/nodes").get("items"):
        api_cluster.simulate("cpu", 1)
    sharing = ("left", "right", "first", "second")
    copy = copied(**TINY)
    fates(
        api_cluster,
        [
            *inspected(**{name: {**TINY, "revision": "abc"} for name in sharing}),
            *(("fetch", name, "complete", FETCHED, {}) for name in sharing),
            *(("quantize", name, "complete", copy, {}) for name in sharing),
        ],
    )
    return api_cluster


@pytest.fixture
def operator(cluster: ApiCluster, namespace: str) -> Iterator[Operator]:
    with serving(cluster, namespace) as operator:
        yield operator


def claim(cluster: ApiCluster, namespace: str, limit: str = "") -> None:
    volume(cluster, namespace, "models")
    metadata: Object = {"name": "models", "namespace": namespace}
    if limit:
        metadata["annotations"] = {"gantline.io/cache-limit": limit}
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "500Gi"}}, "storageClassName": ""}
    apply(cluster, {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})


def shared(name: str, namespace: str, uri: str = "hf://org/name", **spec: Any) -> Object:
    return service(name, namespace, model={"uri": uri}, cache={"claimName": "models", "accessMode": "ReadWriteMany"}, **spec)


def note(cluster: ApiCluster, namespace: str) -> Object:
    """The claim's note."""
    annotations = get(cluster, "pvc", "models", namespace)["metadata"].get("annotations") or {}
    found: Object = json.loads(annotations.get("gantline.io/cache", "{}"))
    return found


def jobs(cluster: ApiCluster, namespace: str, role: str) -> list[str]:
    return [
        item["metadata"]["name"] for item in items(cluster, "jobs", namespace) if item["metadata"]["labels"]["gantline.io/role"] == role
    ]


def served(cluster: ApiCluster, name: str, namespace: str) -> str:
    template = get(cluster, "deployment", name, namespace)["spec"]["template"]["spec"]
    return str(template["containers"][0]["args"][1]).removeprefix("/mnt/cache/")


def test_two_services_of_one_model_and_one_claim_fetch_and_quantize_once(cluster: ApiCluster, namespace: str, operator: Operator) -> None:
    claim(cluster, namespace)
    apply(cluster, *(shared(name, namespace, quantization={"method": "awq"}) for name in ("left", "right")))
    for name in ("left", "right"):
        wait_reason(cluster, name, namespace, "Ready")
        assert {item["kind"]: item["perplexity"] for item in status(cluster, name, namespace)["artefacts"] if item["kind"] == "awq"} == {
            "awq": {"before": "10", "after": "10.2"}
        }
    assert len(jobs(cluster, namespace, "fetch")) == len(jobs(cluster, namespace, "quantize")) == 1
    path = served(cluster, "left", namespace)
    assert served(cluster, "right", namespace) == path
    entries = note(cluster, namespace)["artefacts"]
    assert [user.partition(".")[0] for user in entries[path]["users"]] == ["left", "right"]
    source = next(name for name in entries if name.startswith("fetch-"))
    wait(lambda: not note(cluster, namespace)["artefacts"][source].get("users"), what=lambda: "what was quantized is needed no more")


def test_what_nobody_uses_makes_room_what_is_served_stays_and_what_went_is_fetched_again(
    cluster: ApiCluster, namespace: str, operator: Operator
) -> None:
    claim(cluster, namespace, limit="148Mi")  # one model at a time: 128 MiB are kept beside what is fetched
    apply(cluster, shared("first", namespace))
    wait_reason(cluster, "first", namespace, "Ready")
    old = served(cluster, "first", namespace)
    apply(cluster, shared("second", namespace, uri="hf://org/other"))
    full = wait_reason(cluster, "second", namespace, "DiskFull", "ModelReady")
    assert "are in use" in full["message"] and "gantline.io/cache-limit" in full["message"]
    assert wait_reason(cluster, "second", namespace, "DiskFull", "Degraded")["status"] == "True"
    assert not jobs(cluster, namespace, "evict"), "what is served stays"
    wait_reason(cluster, "first", namespace, "Ready")

    fates(cluster, [("evict", "second", "complete", answer(artefact={"kind": "evict", "evicted": [old], "found": {}}), {})])
    patch(cluster, "first", namespace, {"suspend": True})
    wait_reason(cluster, "second", namespace, "Ready")
    new = served(cluster, "second", namespace)
    assert "EvictionStarted" in event_reasons(cluster, "second", namespace)
    (job,) = [item for item in items(cluster, "jobs", namespace) if item["metadata"]["labels"]["gantline.io/role"] == "evict"]
    assert job["spec"]["template"]["spec"]["containers"][0]["args"] == ["evict", "/mnt/cache", old]
    after = note(cluster, namespace)
    assert old in after["evicted"] and set(after["artefacts"]) == {new}

    cluster.kubectl("delete", "gisvc/second", "-n", namespace)
    wait(lambda: not server_pods(cluster, "second", namespace))
    fates(cluster, [("evict", "first", "complete", answer(artefact={"kind": "evict", "evicted": [new], "found": {}}), {})])
    patch(cluster, "first", namespace, {"suspend": False})
    wait(lambda: old in note(cluster, namespace)["artefacts"])
    wait_reason(cluster, "first", namespace, "Ready")
    assert event_reasons(cluster, "first", namespace).count("FetchStarted") == 2
    assert served(cluster, "first", namespace) == old
    assert set(note(cluster, namespace)["artefacts"]) == {old}
