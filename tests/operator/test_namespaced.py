"""Two releases side by side, each in a namespace of its own and with nothing of the cluster's: no ClusterRole, no node to be seen.

The chart's rendered rights and settings are in force; what the operators know of GPUs is in the ConfigMaps of their inventories.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.client import Client
from gantline_operator.settings import OperatorSettings, from_environment

from tests.operator.applying import apply
from tests.operator.harness import (
    SETTINGS,
    TINY,
    Operator,
    children,
    fates,
    gpu_nodes,
    inspected,
    install_crd,
    remove_gpu_nodes,
    service,
    status,
    wait_reason,
)
from tests.operator.harness import apply as kubectl_apply
from tests.operator.helm import render

Object = dict[str, Any]

CLUSTER_WIDE_GROUPS = ("admissionregistration.k8s.io", "apiextensions.k8s.io", "apiregistration.k8s.io", "storage.k8s.io")


def values(pools: list[Object]) -> Object:
    """What an installer without any right beyond the namespace gives."""
    return {
        "rbac": {"scope": "namespace", "readNodes": False, "userRoles": False},
        "crds": {"install": False},
        "runtime": {"images": {"cuda": SETTINGS.image_cuda, "cpu": SETTINGS.image_cpu}},
        "inventory": {"pools": pools},
    }


def pool(namespace: str, product: str) -> Object:
    selector = {"for": namespace}
    device = {"resource": "nvidia.com/gpu", "count": 8, "product": product, "memory": "79Gi", "computeCapability": "9.0"}
    return {"name": "gpus", "nodeSelector": selector, **device}


def test_the_chart_has_no_object_of_the_cluster_then() -> None:
    kinds = ("monitoring.coreos.com/v1/PodMonitor", "monitoring.coreos.com/v1/PrometheusRule", "gateway.networking.k8s.io/v1/HTTPRoute")
    gateway = {"apiKeys": {"enabled": True}, "ingress": {"host": "llm.example"}, "httpRoute": {"parentRefs": [{"name": "public"}]}}
    for extra in ({}, {"replicaCount": 2, "dashboard": {"enabled": True}}, {"gateway": gateway}):
        for item in render({**values([pool("a", "x")]), **extra}, namespace="a", release="one", kinds=kinds):
            assert not item["kind"].startswith("Cluster") and item["kind"] not in ("Namespace", "PriorityClass", "CustomResourceDefinition")
            assert item["apiVersion"].split("/")[0] not in CLUSTER_WIDE_GROUPS
            assert item["metadata"]["namespace"] == "a"


@pytest.fixture
def namespaces(api_cluster: ApiCluster, namespace: str) -> Iterator[tuple[str, str]]:
    other = f"{namespace}-too"
    api_cluster.client.post("/api/v1/namespaces", {"metadata": {"name": other}})
    yield namespace, other
    for name in (namespace, other):
        remove_gpu_nodes(api_cluster, name)
    api_cluster.client.call("DELETE", f"/api/v1/namespaces/{other}")


def install(cluster: ApiCluster, namespace: str, product: str) -> OperatorSettings:
    """The release's rights and inventory; the settings that its Deployment gives the operator."""
    objects = render(values([pool(namespace, product)]), namespace=namespace)
    for item in objects:
        hook = "helm.sh/hook" in item["metadata"].get("annotations", {})
        if not hook and item["kind"] in ("ServiceAccount", "Role", "RoleBinding", "ConfigMap"):
            apply(cluster.client, item)
    deployment = next(item for item in objects if (item["kind"], item["metadata"]["name"]) == ("Deployment", "gantline"))
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    given = from_environment({item["name"]: item["value"] for item in container["env"] if "value" in item})
    return replace(given, metrics_port=0, health_port=0, workers=2)


def test_each_serves_its_own_by_its_inventory_and_sees_nothing_of_the_other(api_cluster: ApiCluster, namespaces: tuple[str, str]) -> None:
    cluster = api_cluster
    install_crd(cluster)
    fates(cluster, inspected(boxed=TINY))
    with ExitStack() as stack:
        operators = {}
        for number, name in enumerate(namespaces):
            gpu_nodes(cluster, name, "h100")
            settings = install(cluster, name, f"Product-{number}")
            kubeconfig = cluster.service_account_kubeconfig(name, "gantline")
            operators[name] = stack.enter_context(Operator(cluster, settings, kubeconfig=kubeconfig))
            kubectl_apply(cluster, service("boxed", name, accelerator={"resource": "auto"}))
        for number, name in enumerate(namespaces):
            wait_reason(cluster, "boxed", name, "Ready")
            planned = status(cluster, "boxed", name)["plan"]
            assert (planned["product"], planned["resource"]) == (f"Product-{number}", "nvidia.com/gpu")
            assert planned["nodeLabels"] == [{"key": "for", "values": [name]}]
            assert "deployments/boxed" in children(cluster, name)
            assert all(f"/namespaces/{name}/" in path for _, path in operators[name].writes)
    assert_confined(cluster, *namespaces)
    assert_confined(cluster, *namespaces[::-1])


def assert_confined(cluster: ApiCluster, own: str, other: str) -> None:
    """The API server's own word: what the operator of `own` may do there, and that neither it nor the gateway may do that elsewhere."""
    rendered = render(values([pool(own, "x")]), namespace=own)
    objects = [item for item in rendered if "helm.sh/hook" not in item["metadata"].get("annotations", {})]
    granted = {
        (group, resource.partition("/")[0], verb)
        for item in objects
        if item["kind"] == "Role" and item["metadata"]["name"] == "gantline"
        for rule in item["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        if "resourceNames" not in rule and "/" not in resource
    }
    assert ("apps", "deployments", "patch") in granted and ("gantline.io", "inferenceservices", "list") in granted
    elsewhere = [(place, access, False) for access in granted for place in (other, "")]
    elsewhere += [("", ("", kind, verb), False) for kind in ("nodes", "namespaces", "persistentvolumes") for verb in ("get", "list")]
    accounts = [item["metadata"]["name"] for item in objects if item["kind"] == "ServiceAccount"]
    assert sorted(accounts) == ["gantline", "gantline-gateway"]
    for account in accounts:
        client = Client(cluster.service_account_kubeconfig(own, account))
        wanted = elsewhere + ([(own, access, True) for access in granted] if account == "gantline" else [])
        wrong = [(place, access) for place, access, allowed in wanted if may(client, place, *access) is not allowed]
        client.close()
        assert not wrong, json.dumps([account, wrong])


def may(client: Client, namespace: str, group: str, resource: str, verb: str) -> bool:
    attributes = {"verb": verb, "group": group, "resource": resource, "namespace": namespace}
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": attributes}}
    return bool(client.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)["status"]["allowed"])
