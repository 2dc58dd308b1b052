"""Autoscalers that others run: Kubernetes' own, and KEDA by its definition and by what it would ask the operator."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from gantline_devcluster.api_only import ApiCluster, free_port
from gantline_devcluster.binaries import find
from gantline_operator.certificates import upkeep

from tests.operator.definition import defined
from tests.operator.harness import apply, event_reasons, patch, service, status, wait, wait_reason
from tests.operator.helm import render
from tests.operator.scaling_world import NAME, QUICK, owners_of_replicas, scaling, world

APIS = "/apis/apiregistration.k8s.io/v1/apiservices"


@contextmanager
def custom_metrics(cluster: ApiCluster, namespace: str, *, given: bool = False) -> Iterator[dict[str, Any]]:
    """The chart's APIService, led to loopback, where a Service of a cluster without a network cannot lead; the operator's settings for it.
    The certificate is the operator's own, or `given` by whoever installs the chart."""
    port, name = free_port(), f"gantline-custom-metrics.{namespace}.svc"
    certificate = {"secretName": "tls", "caBundle": "x"} if given else {}
    objects = render({"customMetrics": {"enabled": True, "certificate": certificate}}, namespace=namespace)
    api = next(item for item in objects if item["kind"] == "APIService")
    api["spec"] |= {"service": {**api["spec"]["service"], "port": port}}
    if given:
        keys, folder = cluster.folder / "keys", cluster.folder / f"custom-metrics-{namespace}"
        subprocess.run([str(find("keys")), str(keys), f"custom-metrics-{namespace}={name}"], check=True)
        folder.mkdir()
        for ending in ("crt", "key"):
            (folder / f"tls.{ending}").write_bytes((keys / f"custom-metrics-{namespace}.{ending}").read_bytes())
        api["spec"]["caBundle"] = base64.b64encode((keys / "ca.crt").read_bytes()).decode()
        settings = {"custom_metrics_certificate": str(folder)}
    else:
        secret = next(item for item in objects if item["kind"] == "Secret")
        cluster.client.post(f"/api/v1/namespaces/{namespace}/secrets", secret)
        settings = {"custom_metrics_hosts": (name,), "custom_metrics_secret": f"{namespace}/{secret['metadata']['name']}"}
    where = {"metadata": {"name": api["spec"]["service"]["name"]}, "spec": {"type": "ExternalName", "externalName": "localhost"}}
    cluster.client.post(f"/api/v1/namespaces/{namespace}/services", where)
    cluster.client.post(APIS, api)
    try:
        yield {"custom_metrics_port": port, **settings}
    finally:
        cluster.client.call("DELETE", f"{APIS}/{api['metadata']['name']}")


def test_hpa_has_one_to_many_and_gantline_the_step_to_zero_and_back(
    api_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_POLL_S", 0.5)
    monkeypatch.setattr(upkeep, "_SOON_S", 0.2)
    wanted = {"controller": "HPA", "min": 0, "max": 3, "metric": "inflight", "target": 4, **QUICK, "downAfter": "0s"}
    with (
        world(api_cluster, namespace, gateway=True) as made,
        custom_metrics(api_cluster, namespace) as settings,
        scaling(made, **settings) as operator,
    ):
        apply(api_cluster, service(NAME, namespace, scaling=wanted))
        made.wait_replicas(1)
        # Nobody asks: Gantline takes the last one, and the autoscaler rests.
        made.wait_replicas(0)
        assert last_scale(api_cluster, namespace) == (1, 0, "Idle")
        wait(lambda: scaling_active(api_cluster, namespace) == "ScalingDisabled", what=lambda: scaling_active(api_cluster, namespace))
        # The first held request has Gantline bring one back, and no more than that.
        made.demand = {"held": 9, "held_since_s": 0.1, "running": 0, "last_request_age_s": 0.1}
        (first,) = made.wait_replicas(1)
        assert last_scale(api_cluster, namespace) == (0, 1, "HeldRequests")
        made.demand = {"held": 0, "running": 12, "last_request_age_s": 0.1}
        made.replicas[first].running = 12
        made.wait_replicas(3)
        # The adapter has another certificate, and is asked on.
        before = trusted(api_cluster)
        api_cluster.kubectl("patch", "secret", "gantline-custom-metrics", "-n", namespace, "--type=merge", "-p", '{"data": null}')
        wait(lambda: trusted(api_cluster) != before)
        # Nobody asks any more: the autoscaler goes down to one, Gantline to none.
        made.demand = {}
        for replica in made.replicas.values():
            replica.running = 0
        made.wait_replicas(0)
        assert last_scale(api_cluster, namespace) == (1, 0, "Idle")
        happened = lambda: [item for item in event_reasons(api_cluster, NAME, namespace) if item.startswith(("Scaled", "Woke"))]
        wait(lambda: happened() == ["ScaledToZero", "WokeUp", "ScaledToZero"], what=happened)  # an event follows what it tells of
        assert sum(path.endswith("/scale") for _, path in operator.writes) == 3, "the rest was the autoscaler's"


def last_scale(cluster: ApiCluster, namespace: str) -> tuple[int, int, str]:
    """What Gantline did last, once its status tells of what there is."""
    path = f"/apis/gantline.io/v1alpha1/namespaces/{namespace}/inferenceservices/{NAME}"

    def told() -> dict[str, Any] | None:
        live = cluster.client.get(path)
        found: dict[str, Any] = live["status"].get("lastScale") or {}
        return found if found.get("to") == live["spec"]["replicas"] else None

    found = wait(told, what=lambda: cluster.client.get(path)["status"].get("lastScale"))
    return found["from"], found["to"], found["reason"]


def scaling_active(cluster: ApiCluster, namespace: str) -> str:
    """The reason of that condition of the autoscaler's."""
    found = cluster.client.get(f"/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers/{NAME}")
    return next((item["reason"] for item in found.get("status", {}).get("conditions") or [] if item["type"] == "ScalingActive"), "")


def trusted(cluster: ApiCluster) -> str:
    """The authorities of the adapter that the API server trusts."""
    return str(cluster.client.get(f"{APIS}/v1beta2.custom.metrics.k8s.io")["spec"].get("caBundle", ""))


def test_others_follow_the_same_load_and_one_hands_over_to_the_next_without_a_trace(api_cluster: ApiCluster, namespace: str) -> None:
    web = free_port()
    wanted = {"controller": "HPA", "max": 3, "metric": "inflight", "target": 4, **QUICK, "downAfter": "0s"}
    with (
        world(api_cluster, namespace, gateway=True) as made,
        custom_metrics(api_cluster, namespace, given=True) as settings,
        scaling(made, **settings, metrics_port=web, load_url="http://operator:8080"),
    ):
        port = settings["custom_metrics_port"]
        apply(api_cluster, service(NAME, namespace, scaling=wanted))
        (first,) = made.wait_replicas(1)
        made.replicas[first].running = 12
        names = made.wait_replicas(3)
        assert [name.removesuffix("-oldest") for name in owners_of_replicas(api_cluster, namespace)] == ["kube-controller-manager"]
        assert "lastScale" not in status(api_cluster, NAME, namespace), "not one of these was Gantline's"
        wait_reason(api_cluster, NAME, namespace, "ScalingActive", "ScalingReady")
        # Whoever is not the aggregator is not even listened to.
        assert ask(port) == b""
        # Nor is whoever has a certificate of the same authority, under another name.
        other = api_cluster.folder / "keys/apiserver"
        assert ask(port, other).startswith(b"HTTP/1.1 403")
        assert ask(port, other.with_name("front-proxy")).startswith(b"HTTP/1.1 404")
        # Handed over: the autoscaler is gone, and Gantline goes on from where it stands.
        # It is spread: at no moment is there less than three replicas carry, or the autoscaler would take some away at once.
        for name in sorted(names, key=first.__eq__):
            made.replicas[name].running = 4
        patch(api_cluster, NAME, namespace, {"scaling": {"controller": "Gantline"}})
        wait(lambda: not autoscalers(api_cluster, namespace))
        made.replicas[names[0]].running, made.replicas[names[1]].running, made.replicas[names[2]].running = 0, 0, 3
        assert made.wait_replicas(1) == [names[2]]
        # And to one whose kind this cluster does not have: a condition, and the service serves on.
        patch(api_cluster, NAME, namespace, {"scaling": {"controller": "KEDA"}})
        wait_reason(api_cluster, NAME, namespace, "KindMissing", "ScalingReady")
        wait_reason(api_cluster, NAME, namespace, "Ready")
        with defined(api_cluster, "scaledobjects.yaml"):
            patch(api_cluster, NAME, namespace, {"scaling": {"min": 0, "max": 5}})  # a look at it, a minute before the next one
            wait_reason(api_cluster, NAME, namespace, "ScalingActive", "ScalingReady")
            path = f"/apis/keda.sh/v1alpha1/namespaces/{namespace}/scaledobjects/{NAME}"
            wait(lambda: api_cluster.client.get(path)["spec"]["maxReplicaCount"] == 5)
            made_for_keda = api_cluster.client.get(path)["spec"]
            assert made_for_keda["scaleTargetRef"] == {"apiVersion": "gantline.io/v1alpha1", "kind": "InferenceService", "name": NAME}
            assert (made_for_keda["minReplicaCount"], made_for_keda["maxReplicaCount"], made_for_keda["cooldownPeriod"]) == (0, 5, 1)
            # What its trigger asks for is the load; what is not wholly known is no number, since 0 would put the service to sleep.
            address = urlsplit(made_for_keda["triggers"][0]["metadata"]["url"])
            assert (address.netloc, address.path) == ("operator:8080", f"/load/{namespace}/{NAME}")
            load = lambda: get_http(f"http://127.0.0.1:{web}{address.path}")
            wait(lambda: load() == (200, {"load": 0.75}), what=load)
            made.replicas[names[2]].silent = True
            wait(lambda: load()[0] == 503, what=load)
            assert get_http(f"http://127.0.0.1:{web}/load/{namespace}/another")[0] == 503
            assert b"gantline_scalings_total" in urllib.request.urlopen(f"http://127.0.0.1:{web}/metrics").read()
            # KEDA ends its own autoscaler before its object goes: until then nobody else begins.
            made.replicas[names[2]].silent = False
            merge = "application/merge-patch+json"
            api_cluster.client.call("PATCH", path, {"metadata": {"finalizers": ["finalizer.keda.sh"]}}, content_type=merge)
            patch(api_cluster, NAME, namespace, {"scaling": {"controller": "HPA", "min": 1}})
            wait_reason(api_cluster, NAME, namespace, "HandingOver", "ScalingReady")
            time.sleep(2)
            assert not autoscalers(api_cluster, namespace) and "deletionTimestamp" in api_cluster.client.get(path)["metadata"]
            api_cluster.client.call("PATCH", path, {"metadata": {"finalizers": None}}, content_type=merge)
            wait(lambda: autoscalers(api_cluster, namespace))
            wait_reason(api_cluster, NAME, namespace, "ScalingActive", "ScalingReady")
            assert not api_cluster.client.get(f"/apis/keda.sh/v1alpha1/namespaces/{namespace}/scaledobjects").get("items")
            patch(api_cluster, NAME, namespace, {"scaling": {"controller": "Gantline"}})
            wait(lambda: not autoscalers(api_cluster, namespace))


def get_http(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


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
