"""The real KEDA beside an API server without a node: its definitions, rights, operator and metrics adapter, as processes.

Its objects are those of its own installation, in the namespace `keda`. Nothing is taken away again: it ends with the cluster.
"""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path
from typing import Any

import yaml
from gantline_devcluster.api_only import ApiCluster, free_port
from gantline_devcluster.binaries import KEDA_MANIFESTS, find
from gantline_devcluster.processes import Component

from tests.operator.applying import apply
from tests.operator.definition import wait_until_established
from tests.operator.harness import wait

__all__ = ["start_keda"]

Object = dict[str, Any]
NAMESPACE, ACCOUNT = "keda", "keda-operator"
API = "v1beta1.external.metrics.k8s.io"
ADAPTER = "keda-metrics-apiserver"


def start_keda(cluster: ApiCluster) -> None:
    """Returns once its API of external metrics is served."""
    apply(cluster.client, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    apply(cluster.client, {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT, "namespace": NAMESPACE}})
    manifests = [item for name in KEDA_MANIFESTS.binaries for item in yaml.safe_load_all(find(name).read_text()) if item]
    for item in manifests:
        apply(cluster.client, item)
    wait_until_established(cluster, *(item["metadata"]["name"] for item in manifests if item["kind"] == "CustomResourceDefinition"))
    grpc, https = free_port(), free_port()
    certificates = certificates_for(cluster)
    kubeconfig = cluster.service_account_kubeconfig(NAMESPACE, ACCOUNT)
    cluster.run(operator(cluster.folder, kubeconfig, certificates, grpc))
    cluster.run(adapter(cluster.folder, kubeconfig, certificates, grpc, https))
    for item in api(certificates, https):
        apply(cluster.client, item)
    path = f"/apis/apiregistration.k8s.io/v1/apiservices/{API}"
    conditions = lambda: cluster.client.get(path).get("status", {}).get("conditions") or []
    available = lambda: any(item["type"] == "Available" and item["status"] == "True" for item in conditions())
    wait(available, timeout_s=120.0, what=lambda: (conditions(), logs(cluster)))


def certificates_for(cluster: ApiCluster) -> Path:
    """A folder with one pair for both processes, as KEDA's own rotation would write it into its Secret."""
    keys, folder = cluster.folder / "keys", cluster.folder / "keda"
    names = f"localhost,127.0.0.1,{ADAPTER}.{NAMESPACE}.svc"
    subprocess.run([str(find("keys")), str(keys), f"keda={names}"], check=True)
    folder.mkdir()
    for source, target in (("ca.crt", "ca.crt"), ("keda.crt", "tls.crt"), ("keda.key", "tls.key")):
        (folder / target).write_bytes((keys / source).read_bytes())
    return folder


def operator(folder: Path, kubeconfig: Path, certificates: Path, grpc: int) -> Component:
    loopback = [f"--{name}-bind-address=127.0.0.1:{free_port()}" for name in ("metrics", "health-probe")]
    argv = [str(find("keda")), *loopback, f"--metrics-service-bind-address=127.0.0.1:{grpc}", f"--cert-dir={certificates}"]
    return Component("keda", argv, folder / "logs/keda.log", environment=environment(kubeconfig))


def adapter(folder: Path, kubeconfig: Path, certificates: Path, grpc: int, https: int) -> Component:
    given = [f"--{name}-kubeconfig={kubeconfig}" for name in ("lister", "authentication", "authorization")]
    argv = [
        str(find("keda-adapter")), *given, "--bind-address=127.0.0.1", f"--secure-port={https}", f"--port={free_port()}",
        f"--metrics-service-address=127.0.0.1:{grpc}", f"--client-ca-file={certificates / 'ca.crt'}", f"--cert-dir={certificates}",
        f"--tls-cert-file={certificates / 'tls.crt'}", f"--tls-private-key-file={certificates / 'tls.key'}",
    ]  # fmt: skip
    return Component("keda-adapter", argv, folder / "logs/keda-adapter.log", environment=environment(kubeconfig))


def environment(kubeconfig: Path) -> dict[str, str]:
    own = {"POD_NAMESPACE": NAMESPACE, "KEDA_CLUSTER_OBJECT_NAMESPACE": NAMESPACE}
    return {"KUBECONFIG": str(kubeconfig), "WATCH_NAMESPACE": "", **own}


def api(certificates: Path, https: int) -> list[Object]:
    """The APIService, led to loopback, where a Service of a cluster without a network cannot lead."""
    service = {"name": ADAPTER, "namespace": NAMESPACE}
    group = {"group": "external.metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100}
    bundle = base64.b64encode((certificates / "ca.crt").read_bytes()).decode()
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": service, "spec": {"type": "ExternalName", "externalName": "localhost"}},
        {
            "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": API},
            "spec": {**group, "caBundle": bundle, "service": {**service, "port": https}},
        },
    ]  # fmt: skip


def logs(cluster: ApiCluster) -> str:
    """The ends of both logs, for a message."""
    return "\n".join((cluster.folder / f"logs/{name}.log").read_text()[-3000:] for name in ("keda", "keda-adapter"))
