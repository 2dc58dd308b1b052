"""What the control plane's figures are measured with: an operator as a process of its own, watchers beside it, and the kernel's accounts.

Nodes are simulated (kwok), pods become ready at once, so only the operator, the API server and the controllers are measured.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from gantline_devcluster import profiles
from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.client import ApiError
from gantline_devcluster.models import EIGHT_BILLION

ROOT = Path(__file__).parents[1]
GROUP = "/apis/gantline.io/v1alpha1"
SERVICES = f"{GROUP}/namespaces/default/inferenceservices"
CHILDREN = {
    "/api/v1": ("serviceaccounts", "services", "persistentvolumeclaims"),
    "/apis/batch/v1": ("jobs",),
    "/apis/apps/v1": ("deployments", "controllerrevisions"),
    "/apis/policy/v1": ("poddisruptionbudgets",),
    "/apis/networking.k8s.io/v1": ("ingresses", "networkpolicies"),
}


def prepare(cluster: ApiCluster) -> None:
    """The definition, and what every inspect Job finds."""
    cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "crds/gantline.io_inferenceservices.yaml"))
    wait(lambda: _answers(cluster), 30, lambda: "the definition is not served")
    cluster.set_fate({"gantline.io/role": "inspect"}, "complete", message=json.dumps({"reason": "Completed", "facts": EIGHT_BILLION}))


def mixed_nodes(count: int) -> list[dict[str, Any]]:
    names = ("a10", "l4", "a100-80", "h100", "h200")
    each = -(-count // len(names))
    return [node for name in names for node in profiles.load(name, each)][:count]


def gpus(nodes: list[dict[str, Any]]) -> int:
    return sum(int(node["status"]["allocatable"].get("nvidia.com/gpu", 0)) for node in nodes)


def manifest(name: str, **spec: Any) -> dict[str, Any]:
    body = {"model": {"uri": "file:///models/llama"}, "engine": {"sessionLen": 4096}, **spec}
    return {"apiVersion": "gantline.io/v1alpha1", "kind": "InferenceService", "metadata": {"name": name}, "spec": body}


def create(cluster: ApiCluster, name: str, **spec: Any) -> float:
    """The moment at which the API server had answered."""
    cluster.client.post(SERVICES, manifest(name, **spec))
    return time.time()


class OperatorProcess:
    """As in its image; started anew by `restart`, after a SIGKILL."""

    def __init__(self, cluster: ApiCluster, **settings: str) -> None:
        self.port = _free_port()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GANTLINE_")}
        self._environment = {
            **inherited,
            "KUBECONFIG": str(cluster.kubeconfig),
            "GANTLINE_IMAGE_CUDA": "registry.example/gantline-runtime:1",
            "GANTLINE_IMAGE_CPU": "registry.example/gantline-runtime-cpu:1",
            "GANTLINE_LISTEN_ADDRESS": "127.0.0.1",
            "GANTLINE_METRICS_PORT": str(self.port),
            "GANTLINE_HEALTH_PORT": "0",
            "GANTLINE_LOG_LEVEL": "warning",
            **settings,
        }

    def __enter__(self) -> OperatorProcess:
        self._start()
        time.sleep(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def _start(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", "gantline_operator.main"], env=self._environment)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)

    def restart(self) -> None:
        self.kill()
        self._start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def memory_mib(self, field: str = "VmRSS") -> float:
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1]) / 1024

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        """The sum over all series of a metric; 0 while nobody answers."""
        try:
            # It alone: all of them take the operator a tenth of a second with 500 services.
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics?name[]={name}", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            return 0.0
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


class Sightings:
    """When a process of its own first saw an object for each service: a watcher in this one would wait for its own requests."""

    def __init__(self, cluster: ApiCluster, path: str, names: list[str], *, bound: bool = False) -> None:
        version = cluster.client.get(path)["metadata"]["resourceVersion"]
        arguments = [str(cluster.kubeconfig), path, version, ",".join(names), "bound" if bound else ""]
        self._process = subprocess.Popen([sys.executable, "-c", _WATCH, *arguments], stdout=subprocess.PIPE, text=True)
        time.sleep(2)

    def seconds_since(self, applied: dict[str, float], timeout_s: float = 600) -> list[float]:
        output, _ = self._process.communicate(timeout=timeout_s)
        seen = {line.split()[0]: float(line.split()[1]) for line in output.splitlines()}
        return [max(0.0, seen[name] - moment) for name, moment in applied.items()]


ACCOUNTS = "/api/v1/namespaces/default/serviceaccounts?labelSelector=app.kubernetes.io%2Fmanaged-by%3Dgantline-operator"
"""The first child of a service is its ServiceAccount."""
SERVERS = "/api/v1/namespaces/default/pods?labelSelector=gantline.io%2Frole%3Dserver"

_WATCH = """
import sys, time
from pathlib import Path
from gantline_devcluster.client import ApiError, Client
kubeconfig, path, version, names, bound = sys.argv[1:]
wanted = set(names.split(","))
while wanted:
    for event in Client(Path(kubeconfig)).watch(path, version):
        version = event["object"]["metadata"]["resourceVersion"]
        name = event["object"]["metadata"].get("labels", {}).get("gantline.io/service")
        if name in wanted and (not bound or event["object"]["spec"].get("nodeName")):
            wanted.remove(name)
            print(name, time.time(), flush=True)
            if not wanted:
                break
"""


def summary(latencies: list[float]) -> dict[str, float]:
    return {"p50": round(percentile(latencies, 50), 3), "p99": round(percentile(latencies, 99), 3), "max": round(max(latencies), 3)}


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def ready(cluster: ApiCluster) -> int:
    """Services that are ready, or planned and waiting for nothing but room."""
    services = cluster.client.get(f"{GROUP}/inferenceservices")["items"]
    states = [{c["type"]: c for c in item.get("status", {}).get("conditions", [])} for item in services]
    return sum(state.get("Ready", {}).get("reason") in ("Ready", "WaitingForCapacity") for state in states)


def versions(cluster: ApiCluster) -> dict[str, str]:
    """resourceVersions of services, of all that is made for them, and of the events about them."""
    found = {}
    for group, plurals in {**CHILDREN, "/apis/events.k8s.io/v1": ("events",), GROUP: ("inferenceservices",)}.items():
        for plural in plurals:
            for item in cluster.client.get(f"{group}/namespaces/default/{plural}")["items"]:
                found[f"{plural}/{item['metadata']['name']}"] = item["metadata"]["resourceVersion"]
    return found


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Events may expire; nothing else may differ."""
    differ = (key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return sorted(key for key in differ if key in after or not key.startswith("events/"))


def quiet(cluster: ApiCluster, seconds: float) -> bool:
    before = versions(cluster)
    time.sleep(seconds)
    return not changed(before, versions(cluster))


def wait(check: Callable[[], bool], timeout_s: float, what: Callable[[], str], every_s: float = 0.5) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            raise SystemExit(f"gave up after {timeout_s:.0f} s: {what()}")
        time.sleep(every_s)


def say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def _answers(cluster: ApiCluster) -> bool:
    try:
        return "items" in cluster.client.get(f"{GROUP}/inferenceservices")
    except ApiError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
