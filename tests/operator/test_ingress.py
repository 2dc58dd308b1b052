"""The Ingress of a service follows its spec, whatever its revisions do. By kubectl, on a real API server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster

from tests.operator.harness import (
    TINY,
    apply,
    assert_converged,
    children,
    fates,
    get,
    inspected,
    install_crd,
    items,
    patch,
    server_pods,
    service,
    serving,
    wait,
    wait_reason,
)

Object = dict[str, Any]


@pytest.fixture(scope="module")
def world(api_cluster: ApiCluster) -> ApiCluster:
    install_crd(api_cluster)
    fates(api_cluster, inspected(tiny=TINY))
    if not api_cluster.client.get("/api/v1/nodes").get("items"):
        api_cluster.simulate("cpu", 1)
    return api_cluster


@pytest.fixture
def cluster(world: ApiCluster, namespace: str) -> Iterator[ApiCluster]:
    with serving(world, namespace):
        yield world


def hosts(cluster: ApiCluster, namespace: str) -> list[str]:
    return [rule["host"] for item in items(cluster, "ingresses", namespace) for rule in item["spec"]["rules"]]


def test_an_ingress_leads_to_the_api_and_goes_with_its_field_and_no_pod_notices(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, service("tiny", namespace, ingress={"host": "tiny.example.com", "className": "nginx"}))
    wait_reason(cluster, "tiny", namespace, "Ready")
    pods = [pod["metadata"]["uid"] for pod in server_pods(cluster, "tiny", namespace)]
    spec = get(cluster, "ingresses", "tiny", namespace)["spec"]
    path = {"path": "/v1", "pathType": "Prefix", "backend": {"service": {"name": "tiny", "port": {"name": "http"}}}}
    assert spec == {"ingressClassName": "nginx", "rules": [{"host": "tiny.example.com", "http": {"paths": [path]}}]}
    assert "tiny.example.com" in cluster.kubectl("get", "gisvc/tiny", "-n", namespace, "-o", "wide").stdout
    assert_converged(cluster, "tiny", namespace, children(cluster, namespace))
    patch(cluster, "tiny", namespace, {"ingress": None})
    wait(lambda: not items(cluster, "ingresses", namespace))
    wait_reason(cluster, "tiny", namespace, "Ready")
    assert [pod["metadata"]["uid"] for pod in server_pods(cluster, "tiny", namespace)] == pods


def test_annotations_and_tls_of_others_survive_a_change_of_the_host(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, service("tiny", namespace, ingress={"host": "old.example.com"}))
    wait_reason(cluster, "tiny", namespace, "Ready")
    cluster.kubectl("annotate", "ingress/tiny", "-n", namespace, "nginx.ingress.kubernetes.io/proxy-buffering=off")
    tls = [{"hosts": ["new.example.com"], "secretName": "certificate"}]
    cluster.kubectl("patch", "ingress/tiny", "-n", namespace, "--type=merge", "-p", json.dumps({"spec": {"tls": tls}}))
    patch(cluster, "tiny", namespace, {"ingress": {"host": "new.example.com"}})
    wait(lambda: hosts(cluster, namespace) == ["new.example.com"])
    live = get(cluster, "ingresses", "tiny", namespace)
    assert live["metadata"]["annotations"] == {"nginx.ingress.kubernetes.io/proxy-buffering": "off"} and live["spec"]["tls"] == tls


def test_the_ingress_follows_the_spec_while_the_wanted_revision_cannot_be_made(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, service("tiny", namespace, ingress={"host": "first.example.com"}))
    wait_reason(cluster, "tiny", namespace, "Ready")
    patch(cluster, "tiny", namespace, {"model": {"uri": "pvc://missing/model"}, "ingress": {"host": "second.example.com"}})
    wait_reason(cluster, "tiny", namespace, "ModelNotFound")
    assert hosts(cluster, namespace) == ["second.example.com"]
    patch(cluster, "tiny", namespace, {"ingress": None})
    wait(lambda: not items(cluster, "ingresses", namespace))
    assert wait_reason(cluster, "tiny", namespace, "ModelNotFound")["status"] == "False"
    assert wait_reason(cluster, "tiny", namespace, "Available", "Servable")["status"] == "True", "the old pods serve on inside the cluster"


def test_an_ingress_that_somebody_deletes_comes_back(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, service("tiny", namespace, ingress={"host": "tiny.example.com"}))
    wait_reason(cluster, "tiny", namespace, "Ready")
    before = get(cluster, "ingresses", "tiny", namespace)["metadata"]["uid"]
    cluster.kubectl("delete", "ingress/tiny", "-n", namespace)
    wait(lambda: [item for item in items(cluster, "ingresses", namespace) if item["metadata"]["uid"] != before])
