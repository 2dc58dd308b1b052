"""An installation at work, for dashboards to show: a real API server, operator and gateway, and a real `gantline serve` for each pod.

Pods are simulated, since there is no kubelet: `Pods` starts a server where one becomes ready, and tells gateway and Prometheus of it.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gantline_devcluster.api_only import ApiCluster, free_port
from gantline_devcluster.client import Client

from tests.gateway.gateway_process import GatewayProcess, write_services
from tests.operator.boards.prometheus import TARGETS
from tests.operator.harness import FACTS, TINY, answer, apply, fates, inspected, install_crd, items, service, serving, volume
from tests.operator.scaling_world import GATEWAY, is_ready, set_address
from tests.runtime.server_process import REAL, ROOT, ServerProcess

__all__ = ["KEYS", "NAMESPACE", "OFFERED", "Installation", "installation"]

Object = dict[str, Any]
NAMESPACE = "models"
OFFERED = ("chat", "nightly", "summaries")
"""Services that the gateway is told of."""
KEYS = {"search": "gl-search-0123456789abcdef", "reports": "gl-reports-0123456789abcdef"}
_MODEL = ROOT / "examples" / "tiny-model"
_CRAMPED = ("--block-size=16", "--num-cache-blocks=30", "--max-batch-size=8")
"""A cache too small for what is asked of it, so that requests wait and some give up their blocks."""
_NETWORK = "127.77.0"
_PORT = 8000
_LAG_S = 4.0


class Pods:
    """A server for each ready pod of a service that can be asked. `refresh` goes once through all of them."""

    def __init__(self, cluster: ApiCluster, folder: Path) -> None:
        self._cluster, self._folder = copy(cluster), folder
        self._cluster.client = Client(cluster.kubeconfig)  # one connection serves one thread
        self._servers: dict[str, tuple[str, ServerProcess]] = {}
        self._ended: dict[str, float] = {}
        self._started = 0
        self.fixed_targets: list[Object] = []
        self.services = folder / "services.json"
        self.refresh()

    def lose(self, of_service: str) -> None:
        """One of its servers dies. The gateway learns of it as late as in a cluster."""
        server = next(server for name, server in self._servers.values() if name == of_service)
        server.process.kill()

    def refresh(self) -> None:
        self._bury()
        pods = {pod["metadata"]["name"]: pod for pod in items(self._cluster, "pods", NAMESPACE) if _serves(pod)}
        for name in set(self._servers) - set(pods):
            self._servers.pop(name)[1].terminate()
        for name in set(pods) - set(self._servers):
            self._start(name, pods[name]["metadata"]["labels"]["gantline.io/service"])
        self._tell()

    def _bury(self) -> None:
        """Servers that ended a while ago are started again by what follows."""
        for pod, (_, server) in list(self._servers.items()):
            if server.process.poll() is None:
                continue
            self._ended.setdefault(pod, time.monotonic())
            if time.monotonic() - self._ended[pod] > _LAG_S:
                del self._ended[pod], self._servers[pod]

    def _start(self, pod: str, of_service: str) -> None:
        self._started += 1
        address = f"{_NETWORK}.{self._started}"
        flags = (f"--host={address}", f"--port={_PORT}", "--device=cpu", "--drain-delay=0", f"--served-model-name={of_service}", *_CRAMPED)
        server = ServerProcess(_MODEL, *flags, program=REAL)
        server.url = f"http://{address}:{_PORT}"
        self._servers[pod] = of_service, server
        set_address(self._cluster, NAMESPACE, pod, address)

    def _tell(self) -> None:
        replicas: dict[str, list[str]] = {name: [] for name in OFFERED}
        for name, server in self._servers.values():
            if any(line["message"] == "ready" for line in server.logs):
                replicas[name].append(server.url)
        write_services(self.services, *({"name": name, "namespace": NAMESPACE, "replicas": urls} for name, urls in replicas.items()))
        targets = [
            {"targets": [server.url.removeprefix("http://")], "labels": {"namespace": NAMESPACE, "service": name, "pod": pod}}
            for pod, (name, server) in self._servers.items()
        ]
        draft = self._folder / "targets.new"
        draft.write_text(json.dumps([*targets, *self.fixed_targets]))
        draft.replace(self._folder / TARGETS)

    def close(self) -> None:
        self._cluster.client.close()
        for _, server in self._servers.values():
            server.stop()


def _serves(pod: Object) -> bool:
    labels = pod["metadata"].get("labels", {})
    return labels.get("gantline.io/role") == "server" and is_ready(pod) and "deletionTimestamp" not in pod["metadata"]


@dataclass(frozen=True)
class Installation:
    gateway: GatewayProcess
    pods: Pods


@contextmanager
def installation(cluster: ApiCluster, folder: Path) -> Iterator[Installation]:
    """Services that are fine, asleep, without a node and without a model."""
    _prepare(cluster)
    with ExitStack() as stack:
        pods = Pods(cluster, folder)
        stack.callback(pods.close)
        door = stack.enter_context(_gateway(pods, folder))
        port = free_port()
        demand = {"demand_namespace": NAMESPACE, "demand_port": int(door.internal_url.rpartition(":")[2])}
        stack.enter_context(serving(cluster, NAMESPACE, metrics_port=port, scaling_interval_seconds=2.0, **demand))
        pods.fixed_targets = [
            {"targets": [door.internal_url.removeprefix("http://")], "labels": {"job": "gateway"}},
            {"targets": [f"127.0.0.1:{port}"], "labels": {"job": "operator"}},
        ]
        stack.enter_context(_repeated(pods.refresh))
        _apply_services(cluster)
        yield Installation(door, pods)


def _prepare(cluster: ApiCluster) -> None:
    install_crd(cluster)
    cluster.client.post("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    cluster.simulate("cpu", 1)
    volume(cluster, NAMESPACE, "summaries-cache")
    fetched = answer(artefact={"kind": "fetch", "path": "/mnt/cache/x", "bytes": TINY["weightBytes"]})
    found = inspected(chat=TINY, nightly=TINY, summaries={**TINY, "revision": "abc123"}, giant=FACTS)
    missing = ("inspect", "missing", "failed", answer("ModelNotFound", message="there is no such model"), {})
    fates(cluster, [*found, ("fetch", "summaries", "complete", fetched, {}), missing])
    containers = [{"name": "gateway", "image": "registry.example/gateway:test"}]
    pod = {"metadata": {"name": "gateway", "labels": GATEWAY}, "spec": {"containers": containers, "tolerations": [{"operator": "Exists"}]}}
    cluster.client.post(f"/api/v1/namespaces/{NAMESPACE}/pods", pod)
    set_address(cluster, NAMESPACE, "gateway", "127.0.0.1")


def _apply_services(cluster: ApiCluster) -> None:
    quick = {"metric": "inflight", "target": 6, "downAfter": "20s", "zeroAfter": "30s"}
    apply(
        cluster,
        service("chat", NAMESPACE, scaling={"min": 1, "max": 2, **quick}),
        service("nightly", NAMESPACE, scaling={"min": 0, "max": 1, **quick}),
        service("summaries", NAMESPACE, model={"uri": "hf://example/summaries"}),
        service("giant", NAMESPACE, accelerator={"resource": "auto"}),
        service("missing", NAMESPACE),
    )


@contextmanager
def _gateway(pods: Pods, folder: Path) -> Iterator[GatewayProcess]:
    hashes = {name: f"sha256:{hashlib.sha256(key.encode()).hexdigest()}" for name, key in KEYS.items()}
    (folder / "keys").write_text(f"search {hashes['search']}\nreports {hashes['reports']} tokens-per-minute=400\n")
    process = GatewayProcess(f"--services={pods.services}", f"--api-keys={folder / 'keys'}", "--drain-delay=0")
    try:
        yield process.wait_listening()
    finally:
        process.stop()


@contextmanager
def _repeated(step: Callable[[], None]) -> Iterator[None]:
    """`step` every half second, in a thread."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(0.5):
            step()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
