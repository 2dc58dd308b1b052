"""API keys in Secrets, on a real API server and with the rights that the chart gives to the gateway."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from gantline_devcluster.api_only import ApiCluster

from tests.gateway.gateway_process import GatewayProcess
from tests.operator.applying import CLUSTER_WIDE, apply, path_of
from tests.operator.harness import install_crd, wait
from tests.operator.helm import render

Object = dict[str, Any]
OLD, NEW = "gl-old-key-0123456789", "gl-new-key-0123456789"


@pytest.fixture
def installed(api_cluster: ApiCluster, namespace: str) -> Iterator[GatewayProcess]:
    """A gateway as the chart would start it in `namespace`, with its account."""
    install_crd(api_cluster)
    objects = render({"gateway": {"apiKeys": {"enabled": True}}}, namespace=namespace)
    rights = [item for item in objects if item["metadata"]["name"].startswith("gantline-gateway")]
    rights = [item for item in rights if item["kind"] == "ServiceAccount" or item["apiVersion"].startswith("rbac.")]
    for item in rights:
        apply(api_cluster.client, item)
    (deployment,) = [item for item in objects if item["kind"] == "Deployment" and item["metadata"]["name"] == "gantline-gateway"]
    variables = {item["name"]: item["value"] for item in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
    account = api_cluster.service_account_kubeconfig(namespace, "gantline-gateway")
    process = GatewayProcess("--drain-delay=0", **{**variables, "KUBECONFIG": str(account)})
    try:
        yield process.wait_listening()
    finally:
        process.stop()
        for item in rights:
            if item["kind"] in CLUSTER_WIDE:
                api_cluster.client.call("DELETE", path_of(item))


def status(gateway: GatewayProcess, key: str) -> int:
    answer: httpx.Response = gateway.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    return answer.status_code


def put(cluster: ApiCluster, namespace: str, name: str, label: str, **entries: str) -> None:
    data = {entry: base64.b64encode(value.encode()).decode() for entry, value in entries.items()}
    metadata = {"name": name, "namespace": namespace, "labels": {"gantline.io/api-keys": label}}
    apply(cluster.client, {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})


def test_keys_come_change_and_go_with_their_secrets_and_limits_follow_the_replicas(
    api_cluster: ApiCluster, namespace: str, installed: GatewayProcess
) -> None:
    wait(lambda: installed.internal("/readyz").status_code == 200)
    assert status(installed, OLD) == 401, "no Secret yet: nobody gets in"
    put(api_cluster, namespace, "team-a", "true", alice=OLD)
    put(api_cluster, namespace, "team-b", "false", bob=NEW)
    wait(lambda: status(installed, OLD) == 200)
    assert status(installed, NEW) == 401, "without the label's value it is no Secret of ours"
    put(api_cluster, namespace, "team-a", "true", alice=f"{OLD}\n{NEW}")
    wait(lambda: status(installed, NEW) == 200)
    assert status(installed, OLD) == 200, "both, while one replaces the other"
    put(api_cluster, namespace, "team-a", "true", alice=NEW)
    wait(lambda: status(installed, OLD) == 401)
    assert status(installed, NEW) == 200
    api_cluster.kubectl("delete", "secret/team-a", "-n", namespace)
    wait(lambda: status(installed, NEW) == 401)

    pods = [{"addresses": [f"10.0.0.{number}"], "conditions": {"ready": number < 4}} for number in (1, 2, 3, 4)]
    labels = {"kubernetes.io/service-name": "gantline-gateway"}
    metadata = {"name": "gantline-gateway-x", "namespace": namespace, "labels": labels}
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": "IPv4",
        "endpoints": pods,
    }
    apply(api_cluster.client, endpoints)
    wait(lambda: "gantline_gateway_sharing 3.0" in installed.internal("/metrics").text)
    assert not [line for line in installed.lines if OLD in line or NEW in line]
    assert not [line for line in installed.logs if line["level"] in ("warning", "error")], "its rights suffice"
