"""The oracle of the fault tests notices what is missing and what is too much, of every kind that the operator can make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_operator import resources
from gantline_operator.reconcile import Reconcile
from gantline_operator.resources.naming import MANAGED_KINDS

from tests.operator.definition import every_kind
from tests.operator.harness import (
    SETTINGS,
    TINY,
    answer,
    apply,
    fates,
    get,
    inspected,
    install_crd,
    path_of,
    service,
    serving,
    volume,
    wait,
    wait_reason,
)
from tests.operator.oracle import assert_at_rest, desired_of, faults_of

Object = dict[str, Any]
ASKED = {"network_policies": True}
"""Settings without which some kinds are never made."""
STRAYS: dict[str, Object] = {
    "HorizontalPodAutoscaler": {"scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "none"}, "maxReplicas": 1},
    "ScaledObject": {"scaleTargetRef": {"name": "none"}, "triggers": [{"type": "cpu", "metadata": {"value": "1"}}]},
    "InferencePool": {
        "selector": {"matchLabels": {"no": "pod"}},
        "targetPorts": [{"number": 1}],
        "endpointPickerRef": {"name": "none", "port": {"number": 1}},
    },
}


@pytest.fixture(scope="module")
def world(api_cluster: ApiCluster) -> Iterator[ApiCluster]:
    install_crd(api_cluster)
    fetched = answer(artefact={"kind": "fetch", "bytes": TINY["weightBytes"]})
    fates(api_cluster, [*inspected(tiny=TINY, whole={**TINY, "revision": "abc"}, slept=TINY), ("fetch", "whole", "complete", fetched, {})])
    if not any(node["metadata"]["name"] == "cpu-0" for node in api_cluster.client.get("/api/v1/nodes").get("items") or []):
        api_cluster.simulate("cpu", 1)
    with every_kind(api_cluster):
        yield api_cluster


def test_whatever_the_operator_can_make_is_missed_when_it_is_gone(world: ApiCluster, namespace: str) -> None:
    """A kind that is new in MANAGED_KINDS fails here until a service asks for it, and the oracle with it."""
    settings = replace(SETTINGS, **ASKED)
    volume(world, namespace, "whole-cache")
    scaled = {"ingress": {"host": "llm.example.com"}, "scaling": {"controller": "HPA", "min": 2, "max": 3}}
    with serving(world, namespace, **ASKED):
        apply(world, service("whole", namespace, model={"uri": "hf://org/name"}, **scaled))
        apply(world, service("slept", namespace, scaling={"controller": "KEDA", "min": 0, "max": 3}))
        for name in ("whole", "slept"):
            wait_reason(world, name, namespace, "Ready")
        wait(lambda: get(world, "inferenceservices", "whole", namespace)["spec"]["replicas"] == 2)
        assert_at_rest(world, namespace, settings=settings)
    desired = desired_of(world, namespace, settings)
    assert {item["kind"] for item in desired} | {"Job"} == {kind.kind for kind in MANAGED_KINDS}
    plural = {kind.kind: kind.plural for kind in MANAGED_KINDS}
    faults = lambda: faults_of(world, namespace, settings)
    # A claim stays for as long as pods mount it; without its revision nobody knows what else a service wants.
    removed = [item for item in desired if item["kind"] != "PersistentVolumeClaim"]
    for item in sorted(removed, key=lambda item: item["kind"] == "ControllerRevision"):
        kind, name = item["kind"], item["metadata"]["name"]
        world.client.call("DELETE", f"{path_of(plural[kind], namespace)}/{name}?propagationPolicy=Orphan")
        missed = f"{kind} {name} is missing" if kind != "ControllerRevision" else "is not the one that serves"
        wait(lambda missed=missed: any(missed in fault for fault in faults()), what=faults)


@pytest.mark.parametrize("kind", [kind for kind in MANAGED_KINDS if kind.optional], ids=lambda kind: kind.kind)
def test_what_nobody_asked_for_is_told_of_every_optional_kind(world: ApiCluster, namespace: str, kind: resources.ManagedKind) -> None:
    metadata = {"name": "stray", "namespace": namespace, "labels": resources.labels("tiny", "server")}
    body = {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, "spec": STRAYS[kind.kind]}
    world.client.post(path_of(kind.plural, namespace), body)
    assert faults_of(world, namespace) == [f"{kind.kind} stray is there and should not be"]


def test_an_operator_that_deletes_what_it_wants_at_each_resync_is_found_out(
    world: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one did with InferencePools."""
    kept = Reconcile._kept
    monkeypatch.setattr(Reconcile, "_kept", lambda *arguments: {child for child in kept(*arguments) if child[0] != "InferencePool"})
    with serving(world, namespace):
        apply(world, service("tiny", namespace))
        wait_reason(world, "tiny", namespace, "Ready")
    with serving(world, namespace):  # its first look at everything is a resync
        wait(lambda: faults_of(world, namespace) == ["InferencePool tiny is missing"], what=lambda: faults_of(world, namespace))
