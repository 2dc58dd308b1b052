"""Services in every state in which one may stay: nobody writes anything, tells anything, or keeps looking, until there is news."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_operator import stages
from gantline_operator.conditions import Reason

from tests.operator.harness import (
    FACTS,
    TINY,
    Operator,
    answer,
    apply,
    copied,
    fates,
    gpu_nodes,
    inspected,
    install_crd,
    remove_gpu_nodes,
    service,
    serving,
    versions,
    volume,
    wait,
    wait_reason,
)

Object = dict[str, Any]

CRASH = answer("InvalidConfiguration", message="No such flag.")
ENORMOUS = {**FACTS, "numLayers": 2000, "weightBytes": 900_000_000_000, "fingerprint": "sha256:0c"}


def states(namespace: str, place: Object) -> dict[str, tuple[str, Object]]:
    """By the service's name: the reason of Ready at which it stays, and its spec."""
    gpu = {"accelerator": {**place["accelerator"], "products": ["NVIDIA-H100-80GB-HBM3"]}}
    crowded = {"accelerator": {**place["accelerator"], "products": ["NVIDIA-L4"]}}
    return {
        "serves": ("Ready", {}),
        "asleep": ("ScaledToZero", {"replicas": 0}),
        "suspended": ("Suspended", {"suspend": True}),
        "no-claim": ("ModelNotFound", {"model": {"uri": "pvc://nowhere/model"}}),
        "no-cache": ("CacheMissing", {"model": {"uri": "hf://org/name"}, "cache": {"claimName": "nowhere"}}),
        "no-model": ("NotAModel", {}),
        "no-disk": ("DiskFull", {"model": {"uri": "hf://org/name"}}),
        "too-large": ("NeedsSeveralNodes", gpu),
        "no-room": ("WaitingForCapacity", {**crowded, "replicas": 99}),
        "too-bad": ("QualityGateFailed", {**gpu, "quantization": {"method": "awq", "maxPerplexityIncrease": "0.01"}}),
        "breaks": ("InvalidConfiguration", {}),
        "no-metrics": ("Ready", {"scaling": {"controller": "HPA", "max": 3}}),
        "no-keda": ("Ready", {"scaling": {"controller": "KEDA", "max": 3}}),
        "no-gateway": ("Ready", {"scaling": {"min": 0, "max": 3}}),
        "taken": ("NameConflict", {}),
        "no-volume": ("ImageVolumeUnavailable", {"model": {"uri": "oci://registry.example/team/model:v1", "delivery": "image"}}),
    }


def test_what_waits_for_news_is_left_alone_whatever_its_state(
    api_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = api_cluster
    monkeypatch.setitem(stages._PASSES, Reason.DISK_FULL, (600.0, 600.0))  # type: ignore[index]
    install_crd(cluster)
    if not cluster.client.get("/api/v1/nodes").get("items"):
        cluster.simulate("cpu", 1)
    place = gpu_nodes(cluster, namespace, "h100")
    gpu_nodes(cluster, namespace, "l4", name="c")
    wanted = states(namespace, place)
    facts = dict.fromkeys(wanted, TINY) | {"too-large": ENORMOUS, "no-room": FACTS, "too-bad": FACTS}
    facts |= {name: {**TINY, "revision": "abc"} for name in ("no-cache", "no-disk")}
    facts["no-volume"] = {**TINY, "revision": "sha256:" + "0" * 64}
    del facts["no-model"]
    fates(
        cluster,
        [
            *inspected(**facts),
            ("inspect", "no-model", "failed", answer("NotAModel", message="No config.json."), {"exit_code": 65}),
            ("fetch", "no-disk", "failed", answer("DiskFull", message="No room."), {"exit_code": 73}),
            ("evict", "no-disk", "complete", answer(artefact={"kind": "evict", "evicted": [], "found": {}, "halves": {}}), {}),
            ("quantize", "too-bad", "complete", copied(10.0, 12.0), {}),
            ("server", "breaks", "crash-loop", CRASH, {}),
        ],
    )
    for name in ("no-disk", "too-bad"):
        volume(cluster, namespace, f"{name}-cache")
    foreign = {"metadata": {"name": "taken"}, "spec": {"ports": [{"port": 80}], "selector": {"a": "b"}}}
    cluster.client.post(f"/api/v1/namespaces/{namespace}/services", foreign)
    try:
        with serving(cluster, namespace, custom_metrics_port=0) as operator:
            apply(cluster, *(service(name, namespace, **dict(spec)) for name, (_, spec) in wanted.items()))
            for name, (reached, _) in wanted.items():
                wait_reason(cluster, name, namespace, reached, timeout_s=90)
            wait(lambda: quiet(cluster, namespace, operator, 1.0) == ({}, Counter()), timeout_s=90, every_s=0.5, what=lambda: "")
            moved, looked = quiet(cluster, namespace, operator, 8.0)
            assert not moved
            # Where somebody may do something without an event, or a Job is tried again, it is looked at now and then.
            assert {name: count for name, count in looked.items() if count > 2} == {}
    finally:
        remove_gpu_nodes(cluster, namespace)


def quiet(cluster: ApiCluster, namespace: str, operator: Operator, seconds: float) -> tuple[dict[str, str], Counter[str]]:
    """What has another version after so long, and how often each service was reconciled meanwhile."""
    before, looked = versions(cluster, namespace), len(operator.reconciled)
    time.sleep(seconds)
    after = versions(cluster, namespace)
    return {name: version for name, version in after.items() if before.get(name) != version}, Counter(operator.reconciled[looked:])
