"""Kubernetes' own autoscaler, following the metric that the operator serves through the API server's aggregator."""

from __future__ import annotations

import base64
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gantline_devcluster.api_only import ApiCluster, free_port
from gantline_devcluster.binaries import find

from tests.operator.harness import apply, patch, service, status, wait, wait_reason
from tests.operator.helm import render
from tests.operator.scaling_world import NAME, QUICK, owners_of_replicas, scaling, world


@contextmanager
def custom_metrics(cluster: ApiCluster, namespace: str, port: int) -> Iterator[Path]:
    """The chart's APIService, led to loopback, where a Service of a cluster without a network cannot lead; the certificate's folder."""
    keys = cluster.folder / "keys"
    subprocess.run([str(find("keys")), str(keys), f"custom-metrics-{namespace}=gantline-custom-metrics.{namespace}.svc"], check=True)
    folder = cluster.folder / f"custom-metrics-{namespace}"
    folder.mkdir(exist_ok=True)
    for ending in ("crt", "key"):
        (folder / f"tls.{ending}").write_bytes((keys / f"custom-metrics-{namespace}.{ending}").read_bytes())
    bundle = base64.b64encode((keys / "ca.crt").read_bytes()).decode()
    objects = render({"customMetrics": {"enabled": True, "certificate": {"secretName": "tls", "caBundle": "x"}}}, namespace=namespace)
    api = next(item for item in objects if item["kind"] == "APIService")
    api["spec"] |= {"caBundle": bundle, "service": {**api["spec"]["service"], "port": port}}
    where = {"metadata": {"name": api["spec"]["service"]["name"]}, "spec": {"type": "ExternalName", "externalName": "localhost"}}
    cluster.client.post(f"/api/v1/namespaces/{namespace}/services", where)
    cluster.client.post("/apis/apiregistration.k8s.io/v1/apiservices", api)
    try:
        yield folder
    finally:
        cluster.client.call("DELETE", f"/apis/apiregistration.k8s.io/v1/apiservices/{api['metadata']['name']}")


def test_kubernetes_own_autoscaler_follows_the_same_load_and_hands_over_without_a_trace(api_cluster: ApiCluster, namespace: str) -> None:
    port = free_port()
    wanted = {"controller": "HPA", "max": 3, "metric": "inflight", "target": 4, **QUICK, "downAfter": "0s"}
    with (
        world(api_cluster, namespace) as made,
        custom_metrics(api_cluster, namespace, port) as folder,
        scaling(made, custom_metrics_port=port, custom_metrics_certificate=str(folder)),
    ):
        apply(api_cluster, service(NAME, namespace, scaling=wanted))
        (first,) = made.wait_replicas(1)
        made.replicas[first].running = 12
        names = made.wait_replicas(3)
        assert owners_of_replicas(api_cluster, namespace) == ["kube-controller-manager"]
        assert "lastScale" not in status(api_cluster, NAME, namespace), "not one of these was Gantline's"
        wait_reason(api_cluster, NAME, namespace, "ScalingActive", "ScalingReady")
        # Whoever is not the aggregator is not even listened to.
        assert ask(port) == b""
        # Nor is whoever has a certificate of the same authority, under another name.
        other = api_cluster.folder / "keys/apiserver"
        assert ask(port, other).startswith(b"HTTP/1.1 403")
        assert ask(port, other.with_name("front-proxy")).startswith(b"HTTP/1.1 404")
        # Handed over: the autoscaler is gone, and Gantline goes on from where it stands.
        for name in names:
            made.replicas[name].running = 4
        patch(api_cluster, NAME, namespace, {"scaling": {"controller": "Gantline"}})
        wait(lambda: not autoscalers(api_cluster, namespace))
        made.replicas[names[0]].running, made.replicas[names[1]].running, made.replicas[names[2]].running = 0, 0, 3
        assert made.wait_replicas(1) == [names[2]]
        # And to one whose kind this cluster does not have: a condition, and the service serves on.
        patch(api_cluster, NAME, namespace, {"scaling": {"controller": "KEDA"}})
        wait_reason(api_cluster, NAME, namespace, "KindMissing", "ScalingReady")
        wait_reason(api_cluster, NAME, namespace, "Ready")


def ask(port: int, certificate: Path | None = None) -> bytes:
    """What is answered to whoever shows this certificate; nothing where the connection is refused."""
    context = ssl._create_unverified_context()
    if certificate is not None:
        context.load_cert_chain(certificate.with_suffix(".crt"), certificate.with_suffix(".key"))
    try:
        with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return stranger.recv(64)
    except ssl.SSLError:
        return b""


def autoscalers(cluster: ApiCluster, namespace: str) -> list[Any]:
    found: list[Any] = cluster.client.get(f"/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers").get("items") or []
    return found
